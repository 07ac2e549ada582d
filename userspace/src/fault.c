// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* What broke a queue, in words. `where` and `value` are printed in the order the text names them. */
#include <inttypes.h>
#include <stdio.h>

#include "virtqueue.h"

int vq_fault_describe(const struct vq_fault *fault, char *text, size_t size)
{
	unsigned int where = fault->where;
	uint64_t value = fault->value;

	switch (fault->code) {
	case VQ_OK:
		return snprintf(text, size, "not broken");
	case VQ_AVAIL_JUMP:
		return snprintf(text, size, "available index jumped from %u to %" PRIu64 ", more than the ring holds", where,
				value);
	case VQ_HEAD_RANGE:
		return snprintf(text, size, "available entry %u names descriptor %" PRIu64 ", outside the ring", where,
				value);
	case VQ_HEAD_BUSY:
		return snprintf(text, size, "available entry %u names descriptor %" PRIu64 ", whose chain is still in flight",
				where, value);
	case VQ_NEXT_RANGE:
		return snprintf(text, size, "descriptor %u: next %" PRIu64 " is outside its table", where, value);
	case VQ_CHAIN_LONG:
		return snprintf(text, size, "chain at descriptor %u loops, or is longer than %" PRIu64 " descriptors", where,
				value);
	case VQ_CHAIN_BYTES:
		return snprintf(text, size, "chain at descriptor %u has %" PRIu64 " bytes, more than 2^32", where, value);
	case VQ_CHAIN_ORDER:
		return snprintf(text, size, "chain at descriptor %u: buffer %" PRIu64 " is readable, after a writable one",
				where, value);
	case VQ_CHAIN_UNMAPPED:
		return snprintf(text, size, "chain at descriptor %u: buffer at IOVA 0x%" PRIx64
				" is not mapped for this access", where, value);
	case VQ_CHAIN_PIECES:
		return snprintf(text, size, "chain at descriptor %u runs through more than %" PRIu64 " pieces of memory", where,
				value);
	case VQ_INDIRECT_REFUSED:
		return snprintf(text, size, "chain at descriptor %u is indirect, which was not negotiated", where);
	case VQ_INDIRECT_NESTED:
		return snprintf(text, size, "chain at descriptor %u: indirect descriptor inside an indirect table", where);
	case VQ_INDIRECT_NEXT:
		return snprintf(text, size, "chain at descriptor %u: indirect descriptor has a next one", where);
	case VQ_INDIRECT_SIZE:
		return snprintf(text, size, "chain at descriptor %u: indirect table of %" PRIu64
				" bytes is empty, ragged or too long", where, value);
	case VQ_INDIRECT_UNMAPPED:
		return snprintf(text, size, "chain at descriptor %u: indirect table at IOVA 0x%" PRIx64 " is not mapped", where,
				value);
	case VQ_RING_UNMAPPED:
		return snprintf(text, size, "ring at IOVA 0x%" PRIx64 " is no longer mapped", value);
	case VQ_CHAIN_PARTIAL:
		return snprintf(text, size, "chain at descriptor %u: descriptor %" PRIu64
				" was not made available before the first one", where, value);
	case VQ_ID_RANGE:
		return snprintf(text, size, "chain at descriptor %u carries id %" PRIu64 ", outside the ring", where, value);
	case VQ_ID_BUSY:
		return snprintf(text, size, "chain at descriptor %u carries id %" PRIu64 ", which is still in flight", where,
				value);
	case VQ_RING_OVERRUN:
		return snprintf(text, size, "chain at descriptor %u overruns the ring: %" PRIu64
				" descriptors would be in flight", where, value);
	case VQ_USED_JUMP:
		return snprintf(text, size, "used index jumped from %u to %" PRIu64 ", more than is in flight", where, value);
	case VQ_USED_ID:
		return snprintf(text, size, "used entry %u carries id %" PRIu64 ", outside the ring", where, value);
	case VQ_USED_NOT_POSTED:
		return snprintf(text, size, "used entry %u carries id %" PRIu64 ", which starts no posted chain", where,
				value);
	case VQ_USED_LENGTH:
		return snprintf(text, size, "chain %u: device claims %" PRIu64
				" bytes written, more than are writable", where, value);
	case VQ_USED_ORDER:
		return snprintf(text, size, "used entry %u carries id %" PRIu64 ", whose chain is further on than the used index",
				where, value);
	case VQ_POISONED:
		return snprintf(text, size, "shared memory was truncated by its owner");
	}
	return snprintf(text, size, "unknown fault %d", (int)fault->code);
}
