// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* Legacy vhost-user, front-end side, in the order in which QEMU says things (vhost-user specification). */
#include <errno.h>
#include <linux/vhost_types.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "client.h"

enum request {
	GET_FEATURES = 1,
	SET_FEATURES = 2,
	SET_OWNER = 3,
	SET_MEM_TABLE = 5,
	SET_VRING_NUM = 8,
	SET_VRING_ADDR = 9,
	SET_VRING_BASE = 10,
	GET_VRING_BASE = 11,
	SET_VRING_KICK = 12,
	SET_VRING_CALL = 13,
	GET_PROTOCOL_FEATURES = 15,
	SET_PROTOCOL_FEATURES = 16,
	SET_VRING_ENABLE = 18,
	GET_CONFIG = 24,
	ADD_MEM_REG = 37,
};

enum { VERSION = 1, REPLY = 1 << 2, NEED_REPLY = 1 << 3, HEADER = 12 };

#define F_VERSION_1 (1ull << 32)
#define F_FLUSH (1ull << 9)
#define F_PROTOCOL_FEATURES (1ull << 30)
#define P_MQ (1ull << 0)
#define P_REPLY_ACK (1ull << 3)
#define P_CONFIG (1ull << 9)
#define P_CONFIGURE_MEM_SLOTS (1ull << 15)

struct region {
	uint64_t guest, size, user, offset;
};

struct message {
	uint32_t request, flags, size;
	union {
		uint64_t u64;
		struct vhost_vring_state state;
		struct vhost_vring_addr addr;
		struct {
			uint32_t count, padding;
			struct region region[2];
		} table;
		struct {
			uint64_t padding;
			struct region region;
		} slot;
		struct {
			uint32_t offset, size, flags;
			uint8_t data[60];
		} config;
	};
} __attribute__((packed));

_Static_assert(offsetof(struct message, u64) == HEADER, "the payload follows the header");

static void put(struct device *device, struct message *message, uint32_t request, uint32_t flags, size_t size, const int *fds, size_t count)
{
	char control[CMSG_SPACE(2 * sizeof(int))] = { 0 };
	struct iovec part = { message, HEADER + size };
	struct msghdr all = { .msg_iov = &part, .msg_iovlen = 1 };

	message->request = request;
	message->flags = VERSION | flags;
	message->size = (uint32_t)size;
	if (count) {
		struct cmsghdr *rights;

		all.msg_control = control;
		all.msg_controllen = CMSG_SPACE(count * sizeof(int));
		rights = CMSG_FIRSTHDR(&all);
		rights->cmsg_level = SOL_SOCKET;
		rights->cmsg_type = SCM_RIGHTS;
		rights->cmsg_len = CMSG_LEN(count * sizeof(int));
		memcpy(CMSG_DATA(rights), fds, count * sizeof(int));
	}
	if (sendmsg(device->fd, &all, MSG_NOSIGNAL) != (ssize_t)(HEADER + size))
		fail(WRONG_PEER, "%s: request %u: %s", device->path, request, strerror(errno));
}

static void take(struct device *device, void *to, size_t size, uint32_t request)
{
	ssize_t got = recv(device->fd, to, size, MSG_WAITALL);

	if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
		fail(NOT_COMPLETED, "%s: no answer to request %u within %d s", device->path, request, TIMEOUT_S);
	if (got < 0)
		fail(WRONG_PEER, "%s: answer to request %u: %s", device->path, request, strerror(errno));
	if ((size_t)got != size)
		fail(WRONG_PEER, "%s: the back-end hung up instead of an answer to request %u", device->path, request);
}

/* Send and wait for the answer, which has *reply* bytes. */
static void ask(struct device *device, struct message *message, uint32_t request, size_t size, size_t reply)
{
	put(device, message, request, 0, size, NULL, 0);
	take(device, message, HEADER, request);
	if (message->request != request || message->flags != (VERSION | REPLY) || message->size != reply)
		fail(WRONG_PEER, "%s: answer to request %u is %u, flags %#x, %u bytes", device->path, request, message->request,
		     message->flags, message->size);
	take(device, &message->u64, reply, request);
}

/* Send; with REPLY_ACK wait for the word that it was done. */
static void tell(struct device *device, struct message *message, uint32_t request, size_t size, const int *fds, size_t count)
{
	if (!(device->protocol & P_REPLY_ACK)) {
		put(device, message, request, 0, size, fds, count);
		return;
	}
	put(device, message, request, NEED_REPLY, size, fds, count);
	take(device, message, HEADER + sizeof(uint64_t), request);
	if (message->request != request || message->flags != (VERSION | REPLY) || message->size != sizeof(uint64_t))
		fail(WRONG_PEER, "%s: acknowledgement of request %u is %u, flags %#x, %u bytes", device->path, request,
		     message->request, message->flags, message->size);
	if (message->u64)
		fail(WRONG_PEER, "%s: the back-end refuses request %u", device->path, request);
}

static void tell_u64(struct device *device, uint32_t request, uint64_t value, int fd)
{
	struct message message = { .u64 = value };

	tell(device, &message, request, sizeof(value), &fd, fd >= 0);
}

static void tell_state(struct device *device, uint32_t request, uint32_t index, uint32_t value)
{
	struct message message = { .state = { index, value } };

	tell(device, &message, request, sizeof(message.state), NULL, 0);
}

void user_connect(struct device *device)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct timeval limit = { .tv_sec = TIMEOUT_S };

	if (strlen(device->path) >= sizeof(address.sun_path))
		fail(WRONG_USAGE, "%s: a socket's path has less than %zu bytes", device->path, sizeof(address.sun_path));
	memcpy(address.sun_path, device->path, strlen(device->path));
	device->protocol = 0;
	device->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (device->fd < 0 || setsockopt(device->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) ||
	    connect(device->fd, (struct sockaddr *)&address, sizeof(address)))
		fail(WRONG_PEER, "%s: %s", device->path, strerror(errno));
}

uint64_t user_get_features(struct device *device)
{
	struct message message;

	ask(device, &message, GET_FEATURES, 0, sizeof(uint64_t));
	return message.u64;
}

void user_negotiate(struct device *device)
{
	struct message message;
	uint64_t wanted = P_MQ | P_REPLY_ACK | P_CONFIG | (device->table ? 0 : P_CONFIGURE_MEM_SLOTS);
	uint64_t offered = user_get_features(device);

	if (!(offered & F_PROTOCOL_FEATURES) || !(offered & F_VERSION_1))
		fail(WRONG_PEER, "%s: features %#llx lack VERSION_1 or PROTOCOL_FEATURES", device->path, (unsigned long long)offered);
	device->features = offered & (F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH | device->wanted);
	ask(device, &message, GET_PROTOCOL_FEATURES, 0, sizeof(uint64_t));
	wanted &= message.u64;
	if (!(wanted & P_CONFIG))
		fail(WRONG_PEER, "%s: without CONFIG a disk has no size", device->path);
	tell_u64(device, SET_PROTOCOL_FEATURES, wanted, -1);
	device->protocol = wanted;
	tell(device, &message, SET_OWNER, 0, NULL, 0);
	tell_u64(device, SET_VRING_CALL, 0, device->call);
	memset(&message, 0, sizeof(message));
	message.config.size = sizeof(message.config.data);
	ask(device, &message, GET_CONFIG, sizeof(message.config), sizeof(message.config));
	memcpy(&device->sectors, message.config.data, sizeof(device->sectors));
	tell_u64(device, SET_FEATURES, device->features, -1);
}

static struct region region_of(const struct memory *memory)
{
	return (struct region){ memory->guest, memory->size, (uintptr_t)memory->base, 0 };
}

/* Add *memory* to what is *present* already, if anything is. */
void user_add_memory(struct device *device, const struct memory *memory, const struct memory *present)
{
	struct message message = { 0 };

	if (device->protocol & P_CONFIGURE_MEM_SLOTS) {
		message.slot.region = region_of(memory);
		tell(device, &message, ADD_MEM_REG, sizeof(message.slot), &memory->fd, 1);
	} else if (present) {
		int both[] = { present->fd, memory->fd };

		message.table.count = 2;
		message.table.region[0] = region_of(present);
		message.table.region[1] = region_of(memory);
		tell(device, &message, SET_MEM_TABLE, sizeof(message.table), both, 2);
	} else {
		message.table.count = 1;
		message.table.region[0] = region_of(memory);
		tell(device, &message, SET_MEM_TABLE, sizeof(message.table) - sizeof(struct region), &memory->fd, 1);
	}
}

void user_start(struct device *device, const struct memory *memory, const struct ring_place *place, uint16_t base)
{
	user_start_queue(device, memory, place, 0, RING_SIZE, base, device->kick, device->call);
}

void user_start_queue(struct device *device, const struct memory *memory, const struct ring_place *place, uint32_t index, uint32_t num,
		      uint32_t base, int kick, int call)
{
	uintptr_t here = (uintptr_t)memory->base;
	struct message message = { .addr = { .index = index,
					     .desc_user_addr = here + place->desc,
					     .used_user_addr = here + place->used,
					     .avail_user_addr = here + place->avail } };

	tell_state(device, SET_VRING_NUM, index, num);
	tell_state(device, SET_VRING_BASE, index, base);
	tell(device, &message, SET_VRING_ADDR, sizeof(message.addr), NULL, 0);
	tell_u64(device, SET_VRING_KICK, index, kick);
	tell_u64(device, SET_VRING_CALL, index, call);
	tell_state(device, SET_VRING_ENABLE, index, 1);
}

uint16_t user_stop(struct device *device)
{
	struct message message = { 0 };

	ask(device, &message, GET_VRING_BASE, sizeof(message.state), sizeof(message.state));
	return (uint16_t)message.state.num;
}
