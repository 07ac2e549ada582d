// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* One queue of block requests. With `verify`, a block has either one write under way or any number of reads. */
#include "load_blk.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { IN = 0, OUT = 1, OK = 0, NO_STATUS = 0xff, PAGE = 4096, BATCH = 64, WRITING = 255, TRIES = 16 };

struct head {
	uint32_t type, reserved;
	uint64_t sector;
};

static uint64_t data_at(uint32_t depth)
{
	return ((uint64_t)depth * LOAD_BLK_HEAD + PAGE - 1) / PAGE * PAGE;
}

uint64_t load_blk_memory(uint32_t depth, uint32_t block)
{
	return data_at(depth) + (uint64_t)depth * block;
}

static uint8_t *head_of(const struct load_blk *load, uint32_t slot)
{
	return load->config.memory + (size_t)slot * LOAD_BLK_HEAD;
}

static uint8_t *data_of(const struct load_blk *load, uint32_t slot)
{
	return load->config.memory + data_at(load->config.depth) + (size_t)slot * load->config.block;
}

/* The chain of a slot never changes but for how many of its buffers are the device's to read. */
static void describe(struct load_blk *load, uint32_t slot)
{
	const struct load_blk_config *config = &load->config;
	struct vq_buffer *buffers = load->buffers + (size_t)slot * load->per_slot;
	uint64_t head = config->iova + (uint64_t)slot * LOAD_BLK_HEAD;
	uint64_t data = config->iova + data_at(config->depth) + (uint64_t)slot * config->block;
	uint32_t at = 0, i = 0;

	buffers[i++] = (struct vq_buffer){ head, sizeof(struct head) };
	for (; at < config->block; at += buffers[i++].length) {
		uint32_t left = config->block - at;

		buffers[i] = (struct vq_buffer){ data + at, left < config->segment ? left : config->segment };
	}
	buffers[i] = (struct vq_buffer){ head + LOAD_BLK_STATUS, 1 };
}

int load_blk_init(struct load_blk *load, const struct load_blk_config *config)
{
	uint32_t needed;

	memset(load, 0, sizeof(*load));
	if (!config->depth || config->depth > VRING_MAX_NUM || !config->block || config->block % PATTERN_SECTOR ||
	    !config->segment || !config->blocks || config->reads > 100 || !config->seed)
		return -EINVAL;
	load->per_slot = 2 + (uint32_t)(((uint64_t)config->block + config->segment - 1) / config->segment);
	if (load->per_slot > LOAD_BLK_SEGMENTS)
		return -EINVAL;
	needed = load->per_slot <= config->ring.vq->config.table_entries ? 1 : load->per_slot;
	if ((uint64_t)needed * config->depth > config->ring.vq->config.num)
		return -EINVAL;
	load->config = *config;
	load->slots = calloc(config->depth, sizeof(*load->slots));
	load->idle = calloc(config->depth, sizeof(*load->idle));
	load->buffers = calloc((size_t)config->depth * load->per_slot, sizeof(*load->buffers));
	if (config->verify) {
		load->generations = calloc(config->blocks, sizeof(*load->generations));
		load->busy = calloc(config->blocks, sizeof(*load->busy));
	}
	if (!load->slots || !load->idle || !load->buffers || (config->verify && (!load->generations || !load->busy))) {
		load_blk_destroy(load);
		return -ENOMEM;
	}
	for (uint32_t i = 0; i < config->depth; i++) {
		load->idle[load->idle_count++] = config->depth - 1 - i;
		describe(load, i);
		pattern_fill(data_of(load, i), config->block, config->first, 0, config->seed);
	}
	load->random = config->seed;
	histogram_clear(&load->counts.read_latency);
	histogram_clear(&load->counts.write_latency);
	return 0;
}

void load_blk_destroy(struct load_blk *load)
{
	free(load->slots);
	free(load->idle);
	free(load->buffers);
	free(load->generations);
	free(load->busy);
	memset(load, 0, sizeof(*load));
}

static uint64_t step(struct load_blk *load)
{
	uint64_t block = load->cursor++;

	if (load->cursor == load->config.blocks)
		load->cursor = 0;
	return block;
}

/* A block for the next request; false when those tried are under way: something has to come back first. */
static bool choose(struct load_blk *load, bool write, uint64_t *block)
{
	for (uint32_t i = 0; i < TRIES; i++) {
		uint64_t at = load->config.random ? load_below(&load->random, load->config.blocks) : step(load);

		*block = at;
		if (!load->busy || (write ? !load->busy[at] : load->busy[at] < WRITING - 1))
			return true;
	}
	return false;
}

/* The next block to read back; false when there is none. */
static bool sweep(struct load_blk *load, uint64_t *block)
{
	while (load->cursor < load->config.blocks) {
		*block = load->cursor++;
		if (load->generations[*block])
			return true;
	}
	return false;
}

/* Prepares and adds the request of one slot. False when nothing can be added now. */
static bool post(struct load_blk *load, uint64_t due)
{
	const struct load_blk_config *config = &load->config;
	bool write = !load->sweeping && config->reads < 100 && load_below(&load->random, 100) >= config->reads;
	uint32_t at = load->idle[load->idle_count - 1], readable = write ? load->per_slot - 1 : 1;
	struct load_blk_slot *slot = &load->slots[at];
	uint64_t block, sector;
	struct head *head = (void *)head_of(load, at);

	if (load->sweeping ? !sweep(load, &block) : !choose(load, write, &block))
		return false;
	sector = config->first + block * (config->block / PATTERN_SECTOR);
	*slot = (struct load_blk_slot){ .due = due, .block = block, .write = write };
	if (config->verify) {
		slot->generation = write ? ++load->written : load->generations[block];
		load->busy[block] = write ? WRITING : (uint8_t)(load->busy[block] + 1);
		if (write)
			pattern_fill(data_of(load, at), config->block, sector, slot->generation, config->seed);
		else
			memset(data_of(load, at), 0, config->block);
	}
	*head = (struct head){ .type = htole32(write ? OUT : IN), .sector = htole64(sector) };
	head_of(load, at)[LOAD_BLK_STATUS] = NO_STATUS;
	if (vq_driver_add(config->ring.vq, load->buffers + (size_t)at * load->per_slot, readable, load->per_slot - readable,
			  at + UINT64_C(1)) < 0)
		return false; /* there is room: the ring is broken, and says so when it is published */
	load->idle_count--;
	load->started++;
	return true;
}

static enum load_state start(struct load_blk *load, uint64_t now)
{
	struct load_pace *pace = &load->config.pace;
	uint64_t due = load_due(pace, now, load->started, load->idle_count), i;

	if (load->sweeping)
		due = load->idle_count;
	for (i = 0; i < due; i++) {
		if (!post(load, pace->interval && !load->sweeping ? pace->next : now))
			break;
		pace->next += pace->interval;
	}
	return due ? load_publish(&load->config.ring) : LOAD_MORE;
}

/* False when the request failed or its data is wrong. */
static bool finish(struct load_blk *load, const struct vq_done *done, uint64_t now)
{
	const struct load_blk_config *config = &load->config;
	uint32_t at = (uint32_t)(done->token - 1);
	struct load_blk_slot *slot = &load->slots[at];
	uint64_t sector = config->first + slot->block * (config->block / PATTERN_SECTOR);
	uint8_t status = head_of(load, at)[LOAD_BLK_STATUS];

	load->idle[load->idle_count++] = at;
	load->finished++;
	if (status != OK) {
		load->failed_sector = sector;
		load->failed_write = slot->write;
		load->failed_status = status;
		return false;
	}
	if (slot->write) {
		load->counts.writes++;
		histogram_add(&load->counts.write_latency, now - slot->due);
	} else {
		load->counts.reads++;
		histogram_add(&load->counts.read_latency, now - slot->due);
	}
	if (!config->verify)
		return true;
	if (slot->write) {
		load->busy[slot->block] = 0;
		load->generations[slot->block] = slot->generation;
	} else {
		load->busy[slot->block]--;
		if (slot->generation) {
			load->wrong = pattern_check(data_of(load, at), config->block, sector, slot->generation, config->seed);
			load->counts.compared++;
		}
	}
	return load->wrong.fault == PATTERN_GOOD;
}

/* When to look again at the latest: the end of the slice, of patience, or the next one due. */
static uint64_t wake(const struct load_blk *load, uint64_t end, uint64_t now)
{
	const struct load_pace *pace = &load->config.pace;
	uint64_t silent = load->heard + pace->patience;

	if (load->started != load->finished && silent < end)
		end = silent;
	if (pace->interval && !pace->stopping && load->idle_count && pace->next < end)
		end = pace->next > now ? pace->next : now;
	return end;
}

static bool over(const struct load_blk *load)
{
	const struct load_pace *pace = &load->config.pace;

	return load->started == load->finished &&
	       (load->sweeping ? load->cursor >= load->config.blocks : pace->stopping || (pace->goal && load->started >= pace->goal));
}

enum load_state load_blk_run(struct load_blk *load, uint64_t slice)
{
	const struct load_ring *ring = &load->config.ring;
	struct load_pace *pace = &load->config.pace;
	uint64_t now = load_now(), end = now + slice;
	enum load_state state = LOAD_MORE;
	struct vq_done done[BATCH];

	if (!load->started)
		load->config.pace.next = now;
	vq_driver_disable_call(ring->vq);
	while (state == LOAD_MORE && now < end) {
		size_t count;

		if (load->started == load->finished)
			load->heard = now;
		state = start(load, now);
		if (state != LOAD_MORE)
			break;
		count = vq_driver_reap(ring->vq, done, BATCH);
		now = load_now();
		for (size_t i = 0; i < count && state == LOAD_MORE; i++)
			state = finish(load, &done[i], now) ? LOAD_MORE : LOAD_FAILED;
		if (count) {
			load->heard = now;
			vq_poll_found(&pace->poll);
		} else if (ring->vq->fault.code != VQ_OK) {
			state = LOAD_BROKEN;
		} else if (over(load)) {
			state = LOAD_DONE;
		} else if (load->started != load->finished && now - load->heard > pace->patience) {
			state = LOAD_SILENT;
		} else {
			state = load_sleep(pace, ring, 1, &now, wake(load, end, now));
		}
	}
	return state;
}

void load_blk_sweep(struct load_blk *load)
{
	load->sweeping = true;
	load->cursor = 0;
	load->config.pace.stopping = false;
}
