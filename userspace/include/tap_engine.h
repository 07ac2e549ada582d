// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * tap_engine: a queue pair of a network device on a queue of a tap, or on whatever carries one packet, header and frame, with each
 * read and write.
 *
 * Rule: frames are read into receive buffers and written from transmit buffers where they lie; headers alone are copied, and
 * checked on the way (net_rules.h). Nobody is overrun: without a receive buffer nothing is read, and what the tap does not
 * take stays in the transmit queue. A frame that is longer than the one before may end in memory of the engine's, and is
 * copied from there.
 */
#ifndef VDPA_BRIDGE_TAP_ENGINE_H
#define VDPA_BRIDGE_TAP_ENGINE_H

#include "engine.h"
#include "net_rules.h"

/* Frames of one direction. */
struct tap_tally {
	uint64_t frames, large, dropped;
};

struct tap_engine {
	struct engine engine; /* rings: receive, transmit; fd: the queue of the tap, never waits, or -1 */

	/* The owner's, while the gate is held: */
	struct net_terms from_driver, to_driver;
	struct net_filter filter;
	uint32_t header; /* bytes of the driver's, 10 or 12 */
	bool merge; /* a frame may lie in several receive buffers */
	bool used; /* by the driver; else what is sent is dropped, and nothing received */
	bool plugged; /* else frames are dropped both ways */
	bool fresh; /* the owner wants to be asked before the next frame, to see to the tap */
	bool gone; /* there is no tap any more: nobody needs to be asked for it */

	/* For the owner to see, and to clear: */
	int failure; /* errno of the first transfer that failed, of each that says the tap is gone */
	struct tap_tally sent, received;
	uint64_t lost; /* frames that the tap refused */

	/* The engine's: */
	bool failed; /* and said so */
	bool starved; /* for receive buffers */
	bool blocked; /* by a tap that is full */
	uint64_t reach; /* bytes that buffers are laid out for */
	uint64_t late; /* bytes of the frame that waits for buffers, or 0 */
	uint8_t late_header[NET_HEADER];
	uint8_t frame[NET_LARGEST + 1]; /* that frame, or what no buffer was laid out for */
};

void tap_engine_init(struct tap_engine *tap);

/* What was under way is lost, as the tap is not there any more. */
void tap_engine_forget(struct tap_engine *tap);

#endif
