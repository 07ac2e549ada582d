// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/* The command: what to do with the device, and one line of JSON about it. */
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "client.h"

static const char usage[] =
	"Usage: vhost-blk-client [OPTIONS] SOCKET|NODE\n"
	"\n"
	"Writes a pattern through one ring of a vhost-user-blk back-end (or of a disk at /dev/vhost-vdpa-N), reads it back,\n"
	"compares, and prints one line of JSON. The disk's content is overwritten.\n"
	"\n"
	"  --requests N    of each kind (default 1000)\n"
	"  --depth N       requests in flight, 1 to 32 (default 8)\n"
	"  --bytes N       of each request, a multiple of 512 up to 1 MiB (default 4096)\n"
	"  --seed N        of the pattern (default 1)\n"
	"  --read-only     only read and compare, what an earlier run with this seed wrote\n"
	"  --turns N       stop the ring and start it anew, N times in all (default 1)\n"
	"  --keep-index    start it anew where it stood, not from 0 (sockets only)\n"
	"  --mem-table     SET_MEM_TABLE instead of ADD_MEM_REG\n"
	"  --grow          after the writes, add memory while the ring runs, and read into it (sockets only)\n"
	"  --memory-at N   where the memory lies for the device (default 0x40000000)\n"
	"  --grow-at N     the same for what --grow adds (default 0x80000000)\n"
	"  --control N     instead: the time of N GET_FEATURES and of N / 20 whole bring-ups (sockets only)\n"
	"\n"
	"Status: 0 all well, 1 the back-end refused, hung up or talked nonsense, 2 usage, 3 no answer in time, 4 wrong data.\n";

void fail(enum status status, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("vhost-blk-client: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	exit(status);
}

double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static struct memory allocate(uint64_t guest, size_t size)
{
	struct memory memory = { .fd = memfd_create("client", MFD_CLOEXEC), .size = size, .guest = guest };

	if (memory.fd < 0 || ftruncate(memory.fd, (off_t)size))
		fail(WRONG_USAGE, "%zu bytes of memory: %s", size, strerror(errno));
	memory.base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd, 0);
	if (memory.base == MAP_FAILED)
		fail(WRONG_USAGE, "%zu bytes of memory: %s", size, strerror(errno));
	return memory;
}

static void result(const char *name, uint64_t count, double spent, const char *end)
{
	printf("\"%s\": {\"requests\": %llu, \"seconds\": %.6f, \"iops\": %.1f}%s", name, (unsigned long long)count, spent,
	       (double)count / spent, end);
}

static void transfer(struct device *device, const struct workload *load, uint32_t turns, bool keep_index, bool grow)
{
	struct memory memory = allocate(load->memory_at, ring_memory(load));
	struct memory later = allocate(load->grow_at, ring_memory(load));
	struct ring *ring = ring_new(&memory, load);
	struct ring_place place = ring_place();
	double writes = 0, reads = 0;

	if (device->node) {
		node_open(device);
	} else {
		user_connect(device);
		user_negotiate(device);
		user_add_memory(device, &memory, NULL);
	}
	for (uint32_t turn = 0; turn < turns; turn++) {
		uint16_t base;

		if (!keep_index)
			ring_clear(ring);
		if (device->node)
			node_start(device, &memory, &place);
		else
			user_start(device, &memory, &place, ring_index(ring));
		if (!load->skip_writes)
			writes += ring_run(ring, device, true);
		if (grow) {
			user_add_memory(device, &later, &memory);
			ring_move_data(ring, &later);
			grow = false;
		}
		reads += ring_run(ring, device, false);
		if (device->node) {
			node_stop(device);
		} else if ((base = user_stop(device)) != ring_index(ring)) {
			fail(WRONG_PEER, "%s: GET_VRING_BASE says %u after %u requests", device->path, base, ring_index(ring));
		}
		if (device->node && turn + 1 < turns)
			node_open(device);
	}
	printf("{\"bytes\": %u, \"depth\": %u, \"turns\": %u, ", load->bytes, load->depth, turns);
	if (!load->skip_writes)
		result("writes", load->requests * turns, writes, ", ");
	result("reads", load->requests * turns, reads, "}\n");
}

/* Until the server has put the last session away it answers nobody. */
static void settle(struct device *device)
{
	user_connect(device);
	user_get_features(device);
	close(device->fd);
}

static int ascending(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return (a > b) - (a < b);
}

static double median(double *values, uint32_t count)
{
	qsort(values, count, sizeof(*values), ascending);
	return values[count / 2];
}

static void control(struct device *device, const struct workload *load, uint32_t count)
{
	struct memory memory = allocate(load->memory_at, ring_memory(load));
	struct ring *ring = ring_new(&memory, load);
	struct ring_place place = ring_place();
	uint32_t ups = count / 20 ? count / 20 : 1;
	double *messages = calloc(count, sizeof(double)), *starts = calloc(ups, sizeof(double));

	if (!messages || !starts)
		fail(WRONG_USAGE, "no memory for %u times", count);
	user_connect(device);
	for (uint32_t i = 0; i < count; i++) {
		double start = seconds();

		user_get_features(device);
		messages[i] = seconds() - start;
	}
	close(device->fd);
	for (uint32_t i = 0; i < ups; i++) {
		double start;

		settle(device);
		ring_clear(ring);
		start = seconds();
		user_connect(device);
		user_negotiate(device);
		user_add_memory(device, &memory, NULL);
		user_start(device, &memory, &place, 0);
		user_get_features(device);
		starts[i] = seconds() - start;
		close(device->fd);
	}
	printf("{\"message_us\": %.2f, \"bring_up_us\": %.2f}\n", median(messages, count) * 1e6, median(starts, ups) * 1e6);
}

static uint64_t number(const char *text, uint64_t least, uint64_t most)
{
	char *end;
	unsigned long long value;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (errno || *end || end == text || value < least || value > most)
		fail(WRONG_USAGE, "%s is not a number from %llu to %llu", text, (unsigned long long)least, (unsigned long long)most);
	return value;
}

int main(int argc, char **argv)
{
	enum { REQUESTS = 1, DEPTH, BYTES, SEED, READ_ONLY, TURNS, KEEP_INDEX, MEM_TABLE, CONTROL, GROW, MEMORY_AT, GROW_AT, HELP };
	static const struct option options[] = {
		{ "requests", required_argument, NULL, REQUESTS }, { "depth", required_argument, NULL, DEPTH },
		{ "grow", no_argument, NULL, GROW },		   { "bytes", required_argument, NULL, BYTES },	   { "seed", required_argument, NULL, SEED },
		{ "read-only", no_argument, NULL, READ_ONLY },	   { "turns", required_argument, NULL, TURNS },
		{ "keep-index", no_argument, NULL, KEEP_INDEX },   { "mem-table", no_argument, NULL, MEM_TABLE },
		{ "memory-at", required_argument, NULL, MEMORY_AT }, { "grow-at", required_argument, NULL, GROW_AT },
		{ "control", required_argument, NULL, CONTROL },   { "help", no_argument, NULL, HELP },
		{ 0 },
	};
	struct workload load = { .requests = 1000, .depth = 8, .bytes = 4096, .seed = 1,
				 .memory_at = GUEST_ADDRESS, .grow_at = LATER_ADDRESS };
	struct device device = { .fd = -1 };
	uint32_t turns = 1, rounds = 0;
	bool keep_index = false, grow = false;
	struct stat kind;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case REQUESTS: load.requests = number(optarg, 1, UINT32_MAX); break;
		case DEPTH: load.depth = (uint32_t)number(optarg, 1, 32); break;
		case BYTES: load.bytes = (uint32_t)number(optarg, 512, 1 << 20); break;
		case SEED: load.seed = number(optarg, 0, UINT64_MAX); break;
		case READ_ONLY: load.skip_writes = true; break;
		case TURNS: turns = (uint32_t)number(optarg, 1, 1000); break;
		case KEEP_INDEX: keep_index = true; break;
		case GROW: grow = true; break;
		case MEM_TABLE: device.table = true; break;
		case MEMORY_AT: load.memory_at = number(optarg, 0, UINT64_MAX); break;
		case GROW_AT: load.grow_at = number(optarg, 0, UINT64_MAX); break;
		case CONTROL: rounds = (uint32_t)number(optarg, 1, 10000000); break;
		case HELP: fputs(usage, stdout); return 0;
		default: fputs(usage, stderr); return WRONG_USAGE;
		}
	}
	if (optind + 1 != argc || load.bytes % 512) {
		fputs(usage, stderr);
		return WRONG_USAGE;
	}
	device.path = argv[optind];
	if (stat(device.path, &kind))
		fail(WRONG_PEER, "%s: %s", device.path, strerror(errno));
	device.node = S_ISCHR(kind.st_mode);
	if (device.node && (rounds || keep_index || grow || device.table))
		fail(WRONG_USAGE, "%s is a node: --control, --grow, --keep-index and --mem-table are for sockets", device.path);
	device.kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	device.call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (device.kick < 0 || device.call < 0)
		fail(WRONG_USAGE, "eventfd: %s", strerror(errno));
	if (rounds)
		control(&device, &load, rounds);
	else
		transfer(&device, &load, turns, keep_index, grow);
	return 0;
}
