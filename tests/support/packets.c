// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* packets INTERFACE COUNT: sends COUNT broadcast frames of growing size and compares what the interface receives with them.
 * packets INTERFACE pairs COUNT: has the interface use COUNT queue pairs. */
#include <arpa/inet.h>
#include <linux/ethtool.h>
#include <linux/if_packet.h>
#include <linux/sockios.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

enum { PROTOCOL = 0x88b5, LARGEST = 1514 };

static size_t make(uint8_t *frame, unsigned int number)
{
	size_t length = 60 + number * 37 % (LARGEST - 60 + 1);
	memset(frame, 0xff, 6);
	memset(frame + 6, 0x02, 6);
	frame[12] = PROTOCOL >> 8;
	frame[13] = PROTOCOL & 0xff;
	for (size_t at = 14; at < length; at++)
		frame[at] = (uint8_t)(number * 31 + at * 7);
	return length;
}

static int use_pairs(const char *interface, unsigned int count)
{
	struct ethtool_channels channels = {.cmd = ETHTOOL_GCHANNELS};
	struct ifreq request = {.ifr_data = (char *)&channels};
	snprintf(request.ifr_name, sizeof request.ifr_name, "%s", interface);
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (fd < 0 || ioctl(fd, SIOCETHTOOL, &request)) {
		perror("number of queue pairs");
		return 1;
	}
	unsigned int before = channels.combined_count;
	channels.cmd = ETHTOOL_SCHANNELS;
	channels.combined_count = count;
	if (ioctl(fd, SIOCETHTOOL, &request)) {
		perror("other number of queue pairs");
		return 1;
	}
	printf("%u of %u queue pairs, %u from now on\n", before, channels.max_combined, count);
	close(fd);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[2], "pairs"))
		return use_pairs(argv[1], (unsigned int)atoi(argv[3]));
	if (argc != 3)
		return 2;
	struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(PROTOCOL), .sll_ifindex = (int)if_nametoindex(argv[1])};
	struct timeval patience = {.tv_sec = 5};
	int fd = socket(AF_PACKET, SOCK_RAW, htons(PROTOCOL));
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience)) {
		perror("packet socket");
		return 1;
	}
	unsigned int count = (unsigned int)atoi(argv[2]);
	uint8_t sent[LARGEST], got[LARGEST + 1];
	for (unsigned int number = 0; number < count; number++) {
		size_t length = make(sent, number);
		if (send(fd, sent, length, 0) != (ssize_t)length) {
			perror("send");
			return 1;
		}
		for (;;) {
			struct sockaddr_ll from;
			socklen_t size = sizeof from;
			ssize_t have = recvfrom(fd, got, sizeof got, 0, (struct sockaddr *)&from, &size);
			if (have < 0) {
				fprintf(stderr, "frame %u of %zu bytes: ", number, length);
				perror("nothing came back");
				return 1;
			}
			if (from.sll_pkttype == PACKET_OUTGOING)
				continue;
			if (have != (ssize_t)length || memcmp(sent, got, length)) {
				fprintf(stderr, "frame %u: %zd bytes came back, %zu were sent, or they differ\n", number, have, length);
				return 1;
			}
			break;
		}
	}
	printf("%u frames came back as sent\n", count);
	close(fd);
	return 0;
}
