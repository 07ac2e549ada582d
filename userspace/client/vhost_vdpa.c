// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The same device without anybody between: a vhost-vdpa node (linux/vhost.h), to compare with. */
#include <errno.h>
#include <fcntl.h>
#include <linux/vhost.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "client.h"

enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };

#define F_VERSION_1 (1ull << 32)
#define F_ACCESS_PLATFORM (1ull << 33)
#define F_FLUSH (1ull << 9)

static void call(struct device *device, unsigned long request, void *argument, const char *name)
{
	if (ioctl(device->fd, request, argument))
		fail(WRONG_PEER, "%s: %s: %s", device->path, name, strerror(errno));
}

#define CALL(device, request, argument) call(device, request, argument, #request)

static void set_status(struct device *device, uint8_t status)
{
	CALL(device, VHOST_VDPA_SET_STATUS, &status);
}

static void iotlb(struct device *device, uint8_t type, const struct memory *memory)
{
	struct vhost_msg_v2 message = { .type = VHOST_IOTLB_MSG_V2,
					.iotlb = { .iova = GUEST_ADDRESS,
						   .size = memory->size,
						   .uaddr = (uintptr_t)memory->base,
						   .perm = VHOST_ACCESS_RW,
						   .type = type } };

	if (write(device->fd, &message, sizeof(message)) != sizeof(message))
		fail(WRONG_PEER, "%s: IOTLB message %u: %s", device->path, type, strerror(errno));
}

void node_open(struct device *device)
{
	union {
		struct vhost_vdpa_config config;
		uint8_t room[sizeof(struct vhost_vdpa_config) + sizeof(uint64_t)];
	} capacity = { .config = { .off = 0, .len = sizeof(uint64_t) } };
	uint32_t id;

	device->fd = open(device->path, O_RDWR | O_CLOEXEC);
	if (device->fd < 0)
		fail(WRONG_PEER, "%s: %s", device->path, strerror(errno));
	CALL(device, VHOST_VDPA_GET_DEVICE_ID, &id);
	if (id != 2)
		fail(WRONG_PEER, "%s: device type %u is not a disk", device->path, id);
	CALL(device, VHOST_SET_OWNER, NULL);
	CALL(device, VHOST_GET_FEATURES, &device->features);
	device->features &= F_VERSION_1 | F_ACCESS_PLATFORM | F_FLUSH;
	CALL(device, VHOST_VDPA_GET_CONFIG, &capacity);
	memcpy(&device->sectors, capacity.room + sizeof(struct vhost_vdpa_config), sizeof(device->sectors));
}

void node_start(struct device *device, const struct memory *memory, const struct ring_place *place)
{
	struct vhost_vring_state num = { 0, RING_SIZE }, base = { 0, 0 }, enable = { 0, 1 };
	struct vhost_vring_addr addr = { .desc_user_addr = GUEST_ADDRESS + place->desc,
					 .used_user_addr = GUEST_ADDRESS + place->used,
					 .avail_user_addr = GUEST_ADDRESS + place->avail };
	struct vhost_vring_file kick = { 0, device->kick }, callback = { 0, device->call };

	set_status(device, 0);
	set_status(device, ACKNOWLEDGE | DRIVER);
	CALL(device, VHOST_SET_FEATURES, &device->features);
	set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK);
	iotlb(device, VHOST_IOTLB_UPDATE, memory);
	CALL(device, VHOST_SET_VRING_NUM, &num);
	CALL(device, VHOST_SET_VRING_ADDR, &addr);
	CALL(device, VHOST_SET_VRING_BASE, &base);
	CALL(device, VHOST_SET_VRING_KICK, &kick);
	CALL(device, VHOST_SET_VRING_CALL, &callback);
	CALL(device, VHOST_VDPA_SET_VRING_ENABLE, &enable);
	set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

void node_stop(struct device *device)
{
	set_status(device, 0);
	close(device->fd);
}
