// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The driver's end against a device that writes anything into the ring at any time. */
#include <errno.h>

#include "fuzz.h"

enum { NUM = 8, TABLE = 3, TOKENS = 256 };

struct posted {
	bool open;
	uint64_t writable;
};

struct driver {
	struct vq_driver vq;
	uint8_t *area;
	struct posted posted[TOKENS];
	uint8_t next; /* token of the next chain */
	uint8_t oldest; /* of those that are open, with IN_ORDER */
};

static void add(struct driver *d, struct program *p)
{
	struct vq_buffer buffers[8];
	struct vq_request requests[3];
	size_t wanted = 1 + next_byte(p) % 3, used = 0, added;
	uint64_t writable[3] = { 0, 0, 0 };
	int error;

	for (size_t i = 0; i < wanted; i++) {
		uint8_t shape = next_byte(p), ins = shape & 1, outs = shape >> 1 & 1;

		requests[i] = (struct vq_request){ &buffers[used], ins, outs, (uint8_t)(d->next + i) };
		for (uint8_t k = 0; k < ins + outs; k++) {
			uint8_t length = next_byte(p);

			buffers[used++] = (struct vq_buffer){ 0x1000, length == 255 ? UINT32_MAX : length };
			writable[i] += k < ins ? 0 : buffers[used - 1].length;
		}
	}
	if (d->posted[(uint8_t)(d->next + wanted)].open) /* tokens are used once at a time */
		return;
	added = vq_driver_add_many(&d->vq, requests, wanted, &error);
	CHECK(added == wanted ? error == 0 : error == -ENOSPC || error == -EINVAL || error == -EPROTO);
	for (size_t i = 0; i < added; i++)
		d->posted[(uint8_t)(d->next + i)] = (struct posted){ true, writable[i] };
	d->next = (uint8_t)(d->next + added);
}

static void reap(struct driver *d, struct program *p)
{
	struct vq_done done[NUM];
	size_t count = vq_driver_reap(&d->vq, done, 1 + next_byte(p) % NUM);

	for (size_t i = 0; i < count; i++) {
		struct posted *posted = &d->posted[done[i].token];

		CHECK(done[i].token < TOKENS && done[i].head < NUM);
		CHECK(posted->open && done[i].written <= posted->writable);
		if (d->vq.config.in_order)
			CHECK(done[i].token == d->oldest++);
		posted->open = false;
	}
}

/* A used entry that a device could mean: for the slot or cursor that the driver looks at next. */
static void use(struct driver *d, struct program *p)
{
	uint16_t id = next_byte(p) % (NUM + 1);
	uint32_t written = next_byte(p);

	if (d->vq.config.packed) {
		struct packed_desc *desc = packed_at(&d->vq.packed, d->vq.last_used);
		uint16_t flags = (uint16_t)(used_mark(d->vq.last_used) | (written & 1 ? DESC_WRITE : 0));

		second_store(desc, (struct packed_second){ written, id, flags });
	} else {
		_Atomic uint32_t *slot = used_slot(&d->vq.ring, d->vq.last_used);

		atomic_store(&slot[0], htole32(id));
		atomic_store(&slot[1], htole32(written));
		ring16_store(used_idx(&d->vq.ring), (uint16_t)(d->vq.last_used + 1 + next_byte(p) % 2), memory_order_relaxed);
	}
}

static void step(struct driver *d, struct program *p)
{
	char text[200];
	int due;

	switch (next_byte(p) % 10) {
	case 0:
	case 1:
		scribble(p, d->area, d->vq.layout.size);
		break;
	case 2:
	case 3:
		add(d, p);
		break;
	case 4:
	case 5:
		use(d, p);
		break;
	case 6:
	case 7:
		reap(d, p);
		break;
	case 8:
		due = vq_driver_publish(&d->vq);
		CHECK(due >= 0 || d->vq.fault.code != VQ_OK);
		(void)vq_driver_offset(&d->vq);
		break;
	default:
		due = vq_driver_enable_call(&d->vq);
		CHECK(due >= 0 || d->vq.fault.code != VQ_OK);
		vq_driver_disable_call(&d->vq);
	}
	CHECK(vq_fault_describe(&d->vq.fault, text, sizeof(text)) > 0);
	CHECK(d->vq.free <= NUM && d->vq.in_flight <= NUM);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct program p = { data, data + size };
	static struct driver d;
	uint8_t form = next_byte(&p);
	bool packed = form & 1;
	uint32_t tables = form & 4 ? TABLE : 0;
	struct vq_layout layout = vq_layout(NUM, tables, packed);

	memset(&d, 0, sizeof(d));
	d.area = aligned_alloc(64, (layout.size + 63) / 64 * 64);
	CHECK(d.area);
	CHECK(vq_driver_init(&d.vq, &(struct vq_driver_config){ .area = d.area,
								.iova = 0x1000,
								.num = NUM,
								.table_entries = tables,
								.base = packed ? VQ_PACKED_START : 0,
								.event_idx = form & 2,
								.packed = packed,
								.overstated = form & 8,
								.in_order = form & 16 }) == 0);
	while (!at_end(&p))
		step(&d, &p);
	vq_driver_destroy(&d.vq);
	free(d.area);
	return 0;
}
