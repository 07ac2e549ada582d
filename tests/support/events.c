// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* events NODE COUNT: says what the input device at NODE is, switches its first two lights on and off, and prints COUNT events as they come. */
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int complain(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	return 1;
}

static void print_bits(int fd, unsigned int type)
{
	unsigned char bits[KEY_CNT / 8];
	int length = ioctl(fd, EVIOCGBIT(type, sizeof bits), bits);
	unsigned int count = 0, sum = 0;
	for (int at = 0; at < length * 8; at++)
		if (bits[at / 8] >> at % 8 & 1) {
			count++;
			sum += (unsigned int)at;
		}
	if (count)
		printf("type %u: %u codes, sum %u\n", type, count, sum);
}

int main(int argc, char **argv)
{
	char name[256] = "", serial[256] = "";
	struct input_id id;
	struct input_absinfo axis;
	if (argc != 3)
		return 2;
	int fd = open(argv[1], O_RDWR);
	if (fd < 0 || ioctl(fd, EVIOCGNAME(sizeof name), name) < 0 || ioctl(fd, EVIOCGID, &id) < 0)
		return complain(argv[1]);
	ioctl(fd, EVIOCGUNIQ(sizeof serial), serial);
	printf("name %s, serial %s, ids %u %u %u %u\n", name, serial, id.bustype, id.vendor, id.product, id.version);
	for (unsigned int type = 1; type < EV_CNT; type++)
		print_bits(fd, type);
	for (unsigned int code = 0; code < 2; code++)
		if (ioctl(fd, EVIOCGABS(code), &axis) == 0)
			printf("axis %u: %d to %d\n", code, axis.minimum, axis.maximum);
	for (int at = 0; at < 4; at++) {
		struct input_event light = {.type = EV_LED, .code = (unsigned short)(at % 2), .value = at < 2};
		if (write(fd, &light, sizeof light) != sizeof light)
			return complain("light");
	}
	puts("READY");
	fflush(stdout);
	for (int left = atoi(argv[2]); left; left--) {
		struct input_event event;
		if (read(fd, &event, sizeof event) != sizeof event)
			return complain("read");
		if (event.type == EV_LED) /* an echo of our own */
			left++;
		else
			printf("event %u %u %d\n", event.type, event.code, event.value);
	}
	return 0;
}
