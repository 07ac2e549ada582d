// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* What a guest does with GPIO lines and an I2C bus, by the character devices of its kernel.
 * lines info CHIP: the lines and their names.
 * lines loop CHIP OUT IN COUNT: sets line OUT COUNT times and reads each edge, and the level, at line IN.
 * lines edges CHIP IN COUNT: waits for COUNT edges of line IN.
 * lines level CHIP IN: reads line IN.
 * lines i2c BUS ADDRESS BYTES COUNT: writes BYTES (hex, - for none), then reads COUNT bytes, in one transaction. */
#include <fcntl.h>
#include <linux/gpio.h>
#include <linux/i2c-dev.h>
#include <linux/i2c.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { PATIENCE_MS = 30000 };

static void need(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static int request(int chip, unsigned int line, uint64_t flags)
{
	struct gpio_v2_line_request wanted = {.offsets = {line}, .consumer = "lines", .config.flags = flags, .num_lines = 1};
	need(!ioctl(chip, GPIO_V2_GET_LINE_IOCTL, &wanted), "requesting a line");
	return wanted.fd;
}

static int level(int line)
{
	struct gpio_v2_line_values values = {.mask = 1};
	need(!ioctl(line, GPIO_V2_LINE_GET_VALUES_IOCTL, &values), "reading a line");
	return (int)values.bits;
}

static const char *edge(int line)
{
	struct pollfd wait = {.fd = line, .events = POLLIN};
	struct gpio_v2_line_event event;
	if (poll(&wait, 1, PATIENCE_MS) != 1) {
		fprintf(stderr, "no edge came\n");
		exit(1);
	}
	need(read(line, &event, sizeof event) == sizeof event, "reading an edge");
	return event.id == GPIO_V2_LINE_EVENT_RISING_EDGE ? "rising" : "falling";
}

static void info(int chip)
{
	struct gpiochip_info about;
	need(!ioctl(chip, GPIO_GET_CHIPINFO_IOCTL, &about), "asking about the chip");
	printf("%u lines:", about.lines);
	for (unsigned int line = 0; line < about.lines; line++) {
		struct gpio_v2_line_info each = {.offset = line};
		need(!ioctl(chip, GPIO_V2_GET_LINEINFO_IOCTL, &each), "asking about a line");
		printf(" %s", each.name[0] ? each.name : "-");
	}
	printf("\n");
}

static void loop(int chip, unsigned int out, unsigned int in, unsigned int count)
{
	int from = request(chip, out, GPIO_V2_LINE_FLAG_OUTPUT);
	int to = request(chip, in, GPIO_V2_LINE_FLAG_INPUT | GPIO_V2_LINE_FLAG_EDGE_RISING | GPIO_V2_LINE_FLAG_EDGE_FALLING);
	for (unsigned int turn = 0; turn < count; turn++) {
		struct gpio_v2_line_values values = {.bits = !(turn & 1), .mask = 1};
		need(!ioctl(from, GPIO_V2_LINE_SET_VALUES_IOCTL, &values), "setting a line");
		const char *seen = edge(to);
		if (strcmp(seen, turn & 1 ? "falling" : "rising") || level(to) != !(turn & 1)) {
			fprintf(stderr, "turn %u: an edge that is %s, and level %d\n", turn, seen, level(to));
			exit(1);
		}
	}
	printf("%u edges came as set\n", count);
}

static void transfer(int bus, unsigned int address, const char *text, unsigned int count)
{
	uint8_t out[300], in[300];
	size_t length = strcmp(text, "-") ? strlen(text) / 2 : 0;
	if (length > sizeof out || count > sizeof in)
		exit(2);
	for (size_t at = 0; at < length; at++)
		need(sscanf(text + 2 * at, "%2hhx", &out[at]) == 1, "hex");
	struct i2c_msg parts[] = {
		{.addr = (uint16_t)address, .flags = 0, .len = (uint16_t)length, .buf = out},
		{.addr = (uint16_t)address, .flags = I2C_M_RD, .len = (uint16_t)count, .buf = in},
	};
	struct i2c_rdwr_ioctl_data all = {.msgs = length || !count ? parts : parts + 1, .nmsgs = (length || !count ? 1u : 0u) + (count ? 1u : 0u)};
	need(ioctl(bus, I2C_RDWR, &all) == (int)all.nmsgs, "transfer");
	printf("got ");
	for (unsigned int at = 0; at < count; at++)
		printf("%02x", in[at]);
	printf("\n");
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	int fd = open(argv[2], O_RDWR);
	need(fd >= 0, argv[2]);
	if (!strcmp(argv[1], "info")) {
		info(fd);
	} else if (!strcmp(argv[1], "loop") && argc == 6) {
		loop(fd, (unsigned int)atoi(argv[3]), (unsigned int)atoi(argv[4]), (unsigned int)atoi(argv[5]));
	} else if (!strcmp(argv[1], "edges") && argc == 5) {
		int line = request(fd, (unsigned int)atoi(argv[3]), GPIO_V2_LINE_FLAG_INPUT | GPIO_V2_LINE_FLAG_EDGE_RISING | GPIO_V2_LINE_FLAG_EDGE_FALLING);
		printf("WAITING\n");
		fflush(stdout);
		for (int count = atoi(argv[4]); count; count--) {
			printf("edge %s\n", edge(line));
			fflush(stdout);
		}
	} else if (!strcmp(argv[1], "level") && argc == 4) {
		printf("level %d\n", level(request(fd, (unsigned int)atoi(argv[3]), GPIO_V2_LINE_FLAG_INPUT)));
	} else if (!strcmp(argv[1], "i2c") && argc == 6) {
		transfer(fd, (unsigned int)strtoul(argv[3], NULL, 16), argv[4], (unsigned int)atoi(argv[5]));
	} else {
		return 2;
	}
	return 0;
}
