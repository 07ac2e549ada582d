// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Headers are little-endian, frames big-endian. */
#include "net_rules.h"

#include <string.h>

enum { NEEDS_CSUM = 1, DATA_VALID = 2, GSO_NONE = 0, GSO_TCPV4 = 1, GSO_UDP = 3, GSO_TCPV6 = 4, GSO_ECN = 0x80 };
enum { FLAGS, KIND, LENGTH, SIZE = 4, START = 6, OFFSET = 8 }; /* of fields */

static uint32_t get(const uint8_t *at)
{
	return (uint32_t)at[0] | (uint32_t)at[1] << 8;
}

static void put(uint8_t *at, uint64_t value)
{
	at[0] = (uint8_t)value;
	at[1] = (uint8_t)(value >> 8);
}

static bool segments_agreed(const uint8_t *header, const struct net_terms *terms)
{
	uint8_t kind = header[KIND] & (uint8_t)~GSO_ECN;

	if (kind >= 8 || !(terms->gso & 1u << kind) || !get(header + SIZE))
		return false;
	if (header[KIND] & GSO_ECN && !(terms->ecn && (kind == GSO_TCPV4 || kind == GSO_TCPV6)))
		return false;
	return header[FLAGS] & NEEDS_CSUM || header[KIND] == GSO_UDP;
}

bool net_header_agreed(uint8_t header[NET_HEADER], uint64_t length, const struct net_terms *terms)
{
	uint8_t checked[NET_HEADER] = { 0 };

	if (length < NET_SHORTEST)
		return false;
	if (header[FLAGS] & NEEDS_CSUM) {
		uint32_t start = get(header + START), offset = get(header + OFFSET);

		if (!terms->csum || start < NET_SHORTEST || start + offset + 2 > length)
			return false;
		checked[FLAGS] = NEEDS_CSUM;
		put(checked + START, start);
		put(checked + OFFSET, offset);
	} else if (header[KIND] == GSO_NONE && terms->valid) {
		checked[FLAGS] = header[FLAGS] & DATA_VALID;
	}
	if (header[KIND] != GSO_NONE) {
		uint32_t headers = get(header + LENGTH);

		if (!segments_agreed(header, terms))
			return false;
		checked[KIND] = header[KIND];
		put(checked + LENGTH, headers < length ? headers : length);
		put(checked + SIZE, get(header + SIZE));
	}
	memcpy(header, checked, NET_HEADER);
	return true;
}

static bool in_table(const struct net_filter *filter, bool group, const uint8_t *to)
{
	for (uint32_t i = 0; i < filter->count[group]; i++)
		if (memcmp(filter->macs[group][i], to, 6) == 0)
			return true;
	return !group && memcmp(filter->mac, to, 6) == 0;
}

bool net_filter_accepts(const struct net_filter *filter, const uint8_t top[NET_TOP])
{
	static const uint8_t everybody[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };
	bool group = top[0] & 1;

	if (filter->promisc)
		return true;
	if (filter->tagged && top[12] == 0x81 && top[13] == 0) {
		uint32_t tag = ((uint32_t)top[14] << 8 | top[15]) & 0xfff;

		if (!(filter->vlans[tag / 64] >> tag % 64 & 1))
			return false;
	}
	if (memcmp(top, everybody, 6) == 0)
		return !filter->nobcast;
	return !filter->none[group] && (filter->all[group] || in_table(filter, group, top));
}
