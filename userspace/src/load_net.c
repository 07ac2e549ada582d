// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* One queue pair. A turn of the loop takes back what was sent, sends a batch, and takes what came. */
#include "load_net.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

enum { REAP = 64, LOOKS = 64 }; /* completions at once; turns between two looks at the clock when there is no need of it */

int load_net_init(struct load_net *load, const struct load_net_config *config)
{
	memset(load, 0, sizeof(*load));
	histogram_clear(&load->counts.latency);
	load->config = *config;
	if (!config->batch || config->batch > LOAD_NET_BATCH || config->mode < LOAD_NET_SEND || config->mode > LOAD_NET_ECHO ||
	    config->frame < LOAD_NET_SHORTEST || config->header + (uint64_t)config->frame > config->outgoing->stride ||
	    config->room <= config->header || config->room > config->incoming->stride)
		return -EINVAL;
	return 0;
}

static void stamp(struct load_net *load, uint8_t *data, uint64_t number, uint64_t now)
{
	struct load_net_stamp stamp = { htole64(load->config.seed), htole64(number), htole64(now) };

	memcpy(data + load->config.header + LOAD_NET_ETHERNET, &stamp, sizeof(stamp));
}

static enum load_state send_batch(struct load_net *load, uint64_t now)
{
	const struct load_net_config *config = &load->config;
	struct load_pace *pace = &load->config.pace;
	uint32_t length = config->header + config->frame;
	uint64_t most = config->batch, due;

	if (config->window && config->mode == LOAD_NET_ECHO)
		most = load->open >= config->window ? 0 : most < config->window - load->open ? most : config->window - load->open;
	due = vq_slots_room(config->outgoing, load_due(pace, now, load->started, most));
	if (!due)
		return LOAD_MORE;
	for (uint64_t i = 0; i < due; i++)
		stamp(load, vq_slots_data(config->outgoing, vq_slots_next(config->outgoing, i)), load->started + i, now);
	due = vq_slots_add(config->outgoing, &length, false, due);
	load->started += due;
	load->open += config->mode == LOAD_NET_ECHO ? due : 0;
	pace->next += due * pace->interval;
	return load_publish(&config->sender);
}

/* Takes back what the device has sent; how many, or -1 when the ring is broken. */
static long take_sent(struct load_net *load)
{
	const struct load_net_config *config = &load->config;
	struct vq_done done[REAP];
	size_t count = vq_driver_reap(config->sender.vq, done, REAP);

	for (size_t i = 0; i < count; i++)
		(void)vq_slots_take(config->outgoing, &done[i]);
	load->finished += count;
	load->counts.sent += count;
	return count || config->sender.vq->fault.code == VQ_OK ? (long)count : -1;
}

/* What came back, by its stamp. */
static void look_at(struct load_net *load, const uint8_t *data, uint32_t written, uint64_t now)
{
	const struct load_net_config *config = &load->config;
	struct load_net_stamp stamp;
	uint64_t number;

	if (written < config->header + LOAD_NET_SHORTEST) {
		load->counts.foreign++;
		return;
	}
	memcpy(&stamp, data + config->header + LOAD_NET_ETHERNET, sizeof(stamp));
	number = le64toh(stamp.number);
	if (le64toh(stamp.seed) != config->seed || number >= load->started || written != config->header + config->frame) {
		load->counts.foreign++;
		return;
	}
	load->echoed = true;
	load->counts.ours++;
	load->counts.reordered += number < load->expected;
	load->expected = number >= load->expected ? number + 1 : load->expected;
	load->open -= load->open != 0;
	histogram_add(&load->counts.latency, now - le64toh(stamp.sent));
}

/* Takes what came and gives the buffers back to the device. */
static enum load_state receive(struct load_net *load, uint64_t now, size_t *count)
{
	const struct load_net_config *config = &load->config;
	struct vq_done done[REAP];

	*count = vq_driver_reap(config->receiver.vq, done, REAP);
	if (!*count)
		return config->receiver.vq->fault.code == VQ_OK ? LOAD_MORE : LOAD_BROKEN;
	for (size_t i = 0; i < *count; i++) {
		int slot = vq_slots_take(config->incoming, &done[i]);

		if (slot < 0)
			continue;
		if (done[i].written < config->header) {
			load->headless = done[i].written;
			return LOAD_FAILED;
		}
		load->counts.received_bytes += done[i].written - config->header;
		if (config->mode == LOAD_NET_ECHO)
			look_at(load, vq_slots_data(config->incoming, (uint16_t)slot), done[i].written, now);
	}
	load->counts.received += *count;
	vq_slots_add(config->incoming, &config->room, false, config->incoming->idle_count);
	return load_publish(&config->receiver);
}

/* Whether all that was wanted is there, or will not come any more. */
static bool over(struct load_net *load, uint64_t now)
{
	const struct load_pace *pace = &load->config.pace;
	bool sending = load->config.mode & LOAD_NET_SEND;

	if (!sending)
		return pace->stopping || (pace->goal && load->counts.received >= pace->goal);
	if (load->config.mode == LOAD_NET_ECHO && load->open && now - load->heard > load->config.linger) {
		load->counts.lost += load->open;
		load->open = 0;
	}
	return (pace->stopping || (pace->goal && load->started >= pace->goal)) && load->started == load->finished &&
	       (load->config.mode != LOAD_NET_ECHO || !load->open);
}

static uint64_t wake(const struct load_net *load, uint64_t end, uint64_t now)
{
	const struct load_net_config *config = &load->config;
	const struct load_pace *pace = &config->pace;
	uint64_t silent = load->heard + (config->mode == LOAD_NET_ECHO && load->open ? config->linger : pace->patience);

	if (config->mode & LOAD_NET_SEND && silent < end)
		end = silent > now ? silent : now;
	if (pace->interval && !pace->stopping && pace->next < end)
		end = pace->next > now ? pace->next : now;
	return end;
}

/* The device takes no frames, or never gave one back of those that were to come back. */
static bool silent(const struct load_net *load, uint64_t now)
{
	const struct load_net_config *config = &load->config;

	if (config->mode == LOAD_NET_ECHO && !load->echoed && load->started && now - load->began > config->pace.patience)
		return true;
	return load->started != load->finished && now - load->heard > config->pace.patience;
}

/* One turn: send, take back, receive. *moved says whether anything came back. */
static enum load_state turn(struct load_net *load, uint64_t now, bool *moved)
{
	const struct load_net_config *config = &load->config;
	enum load_state state = LOAD_MORE;
	size_t came = 0;
	long taken = 0;

	if (config->mode & LOAD_NET_SEND) {
		taken = take_sent(load);
		if (taken < 0)
			return LOAD_BROKEN;
		state = send_batch(load, now);
	}
	if (state == LOAD_MORE && config->mode & LOAD_NET_RECEIVE)
		state = receive(load, now, &came);
	*moved = taken || came;
	return state;
}

enum load_state load_net_run(struct load_net *load, uint64_t slice)
{
	const struct load_net_config *config = &load->config;
	const struct load_ring rings[2] = { config->sender, config->receiver };
	const struct load_ring *waits = rings + (config->mode == LOAD_NET_RECEIVE);
	const struct load_pace *pace = &config->pace;
	uint64_t now = load_now(), end = now + slice;
	bool timed = config->mode == LOAD_NET_ECHO || pace->interval;
	enum load_state state = LOAD_MORE;

	if (!load->started)
		load->config.pace.next = load->began = load->heard = now;
	for (uint32_t i = 0; i < 2; i++)
		vq_driver_disable_call(rings[i].vq);
	for (uint32_t looks = 0; state == LOAD_MORE && now < end; looks++) {
		bool moved;

		state = turn(load, now, &moved);
		if (state != LOAD_MORE)
			break;
		if (moved)
			vq_poll_found(&load->config.pace.poll);
		if (moved && !timed && looks % LOOKS)
			continue;
		now = load_now();
		if (moved || (load->started == load->finished && !load->open))
			load->heard = now;
		if (over(load, now))
			state = LOAD_DONE;
		else if (silent(load, now))
			state = LOAD_SILENT;
		else if (!moved)
			state = load_sleep(&load->config.pace, waits, config->mode == LOAD_NET_ECHO ? 2 : 1, &now, wake(load, end, now));
	}
	return state;
}
