// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* vsock_cat CID PORT: connects, sends stdin and then its end, and copies what comes back to stdout, both at a time.
 * vsock_cat listen PORT COUNT: gives back, to COUNT connections one after the other, what each of them sends.
 * vsock_cat hold CID PORT COUNT: opens COUNT connections at a time, sends a number over each, and compares what comes back. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

enum { PIECE = 64 << 10, MOST = 1000, PATIENCE = 30000 };

static int complain(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	return 1;
}

static int connected(unsigned int cid, unsigned int port)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
	int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address)) {
		close(fd);
		return -1;
	}
	return fd;
}

static int written(int fd, const char *data, size_t length)
{
	while (length) {
		ssize_t done = write(fd, data, length);
		if (done < 0)
			return -1;
		data += done;
		length -= (size_t)done;
	}
	return 0;
}

/* From in to fd and from fd to out, until both have ended. What is read is written without a look at the other direction, so whoever
 * is at the other end has to read while it writes. */
static int copy(int fd, int in, int out)
{
	static char data[PIECE];
	struct pollfd polls[2] = {{.fd = fd, .events = POLLIN}, {.fd = in, .events = POLLIN}};
	while (polls[0].fd >= 0 || polls[1].fd >= 0) {
		int ready = poll(polls, 2, PATIENCE);
		if (ready <= 0) {
			errno = ready ? errno : ETIMEDOUT;
			return complain("poll");
		}
		for (int side = 0; side < 2; side++) {
			if (polls[side].fd < 0 || !polls[side].revents)
				continue;
			ssize_t length = read(polls[side].fd, data, sizeof data);
			if (length < 0)
				return complain(side ? "read from stdin" : "read from the connection");
			if (length && written(side ? fd : out, data, (size_t)length))
				return complain("write");
			if (!length) {
				polls[side].fd = -1;
				if (side)
					shutdown(fd, SHUT_WR);
			}
		}
	}
	return 0;
}

static int listen_on(unsigned int port, int count)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
	int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16))
		return complain("listen");
	puts("LISTENING");
	fflush(stdout);
	while (count--) {
		int fd = accept(listener, NULL, NULL);
		if (fd < 0)
			return complain("accept");
		static char data[PIECE];
		ssize_t length;
		while ((length = read(fd, data, sizeof data)) > 0)
			if (written(fd, data, (size_t)length))
				return complain("write");
		if (length < 0)
			return complain("read");
		close(fd);
	}
	return 0;
}

static int hold(unsigned int cid, unsigned int port, int count)
{
	static int fds[MOST];
	if (count > MOST)
		return 2;
	for (int at = 0; at < count; at++)
		if ((fds[at] = connected(cid, port)) < 0 || written(fds[at], (char *)&at, sizeof at))
			return complain("connect and write");
	for (int at = count; at--;) {
		int back = -1;
		if (recv(fds[at], &back, sizeof back, MSG_WAITALL) != sizeof back || back != at)
			return complain("read what was written");
		close(fds[at]);
	}
	printf("%d connections at a time\n", count);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "listen"))
		return listen_on((unsigned int)atoi(argv[2]), atoi(argv[3]));
	if (argc == 5 && !strcmp(argv[1], "hold"))
		return hold((unsigned int)atoi(argv[2]), (unsigned int)atoi(argv[3]), atoi(argv[4]));
	if (argc != 3)
		return 2;
	int fd = connected((unsigned int)atoi(argv[1]), (unsigned int)atoi(argv[2]));
	return fd < 0 ? complain("connect") : copy(fd, STDIN_FILENO, STDOUT_FILENO);
}
