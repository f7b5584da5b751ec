/* Load client of the benchmark: one thread, any number of connections, each with a fixed number
 * of commands in flight.  Written in C to cost little CPU time beside the server.
 *
 *     load SOCKET PID[,PID]... qmp|s6 WORK [NAME=NUMBER]...
 *
 * WORK is pair (add-fd, then remove-fd of the descriptor added), fill (add-fd only), stock (add
 * all, then remove all, repeatedly), query, open, or idle (connect, print "ready", wait for a line
 * on standard input).  At the end the client prints one line of JSON: the number of commands, the
 * CPU time of all threads of the server's processes, and the latency of the replies.  Every reply
 * is checked.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"

enum { MAX_FDS = 253, PATIENCE = 20, LONGEST_RUN = 120 };

struct command { /* sent, and not answered yet */
    uint64_t sent, server_cpu;
    long set;
    enum kind kind;
};

struct client {
    int sock;
    char *buffer;
    size_t have, room;
    struct command *ring; /* pending commands; the server answers in order */
    long head, count;
    int passed; /* descriptors received with replies, less those accounted for */
};

/* The options and their defaults. */
static long clients = 1, in_flight = 1, commands = 1000000000, milliseconds = 60000, fds = 1,
            expect = -1, watch = 0, together = 0; /* together: a second load client runs too */
static const struct { const char *name; long *value; } options[] = {
    {"clients", &clients}, {"in-flight", &in_flight}, {"commands", &commands},
    {"milliseconds", &milliseconds}, {"fds", &fds}, {"expect", &expect}, {"watch", &watch},
    {"together", &together},
};

static int s6, file, own_thread = -1;
static const char *work, *pids;
static uint64_t deadline, slowest, slowest_cpu;
static long started, done, total, serial; /* serial: s6 identifiers are chosen by the client */
static long *sets; /* with stock: ids of the sets added */
static long n_sets, next_set, removing;
static uint32_t *waits; /* round trip of each command, in nanoseconds */
static size_t n_waits, max_waits;
static size_t listing; /* length of the first listing, in bytes */

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* -- requests ------------------------------------------------------------------------------- */

static void send_command(struct client *c, enum kind kind, long set)
{
    char text[200], control[CMSG_SPACE(MAX_FDS * sizeof(int))];
    if (s6 && kind == ADD)
        set = serial++;
    struct iovec part = {text, s6 ? write_s6(text, kind, set) : write_qmp(text, kind, set, fds)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (kind == ADD) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(fds * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(fds * sizeof(int));
        for (int i = 0; i < fds; i++)
            memcpy(CMSG_DATA(header) + i * sizeof(int), &file, sizeof(int));
    }
    struct command *command = &c->ring[(c->head + c->count++) % in_flight];
    *command = (struct command){.set = set, .kind = kind};
    if (own_thread >= 0)
        command->server_cpu = cpu_of(own_thread);
    command->sent = now();
    started++;
    if (sendmsg(c->sock, &message, MSG_NOSIGNAL) != (ssize_t)part.iov_len)
        fail("cannot send: %s", strerror(errno));
}

/* Send the next command, unless the run has reached its number of commands or its deadline. */
static void send_next(struct client *c, const struct command *last, long set)
{
    int over = started >= commands || now() >= deadline;
    if (!strcmp(work, "stock")) {
        over = started >= commands; /* no deadline within one fill-and-empty cycle */
        if (last && last->kind == ADD)
            sets[n_sets++] = set;
        if (removing && next_set < n_sets)
            send_command(c, REMOVE, sets[next_set++]);
        else if (!removing && !over)
            send_command(c, ADD, 0);
    } else if (!strcmp(work, "pair") && last && last->kind == ADD)
        send_command(c, REMOVE, set);
    else if (over)
        return;
    else if (!strcmp(work, "query"))
        send_command(c, QUERY, 0);
    else
        send_command(c, strcmp(work, "open") ? ADD : OPEN, 0);
}

/* -- replies -------------------------------------------------------------------------------- */

/* Check one reply, and send the next command. */
static void answered(struct client *c, const char *text, size_t length)
{
    if (!c->count)
        fail("a reply that nobody asked for: %.*s", (int)length, text);
    struct command command = c->ring[c->head];
    c->head = (c->head + 1) % in_flight;
    c->count--;
    uint64_t wait = now() - command.sent;
    slowest = wait > slowest ? wait : slowest;
    if (own_thread >= 0) {
        uint64_t cpu = cpu_of(own_thread) - command.server_cpu;
        slowest_cpu = cpu > slowest_cpu ? cpu : slowest_cpu;
    }
    if (n_waits < max_waits)
        waits[n_waits++] = wait > UINT32_MAX ? UINT32_MAX : wait;
    done++;

    long set = command.set;
    if (s6 ? length < 7 || text[6] : length < 12 || memcmp(text, "{\"return\":", 10))
        fail("an error: %.*s", length > 200 ? 200 : (int)length, s6 ? "(s6)" : text);
    if (command.kind == ADD && !s6) {
        set = number_after(text, length, "\"fdset-id\":");
        number_after(text, length, "\"fd\":");
    }
    if (command.kind == OPEN && c->passed-- < 1)
        fail("no descriptor came with the reply");
    if (command.kind == QUERY && !listing) {
        listing = length;
        long found = s6 ? count_of(text, length, "bench-") : count_of(text, length, "\"fd\":");
        if (expect >= 0 && found != expect && found != expect + together)
            fail("%ld descriptors are listed, not %ld", found, expect);
    } else if (command.kind == QUERY && length != listing && !together)
        fail("the listing has changed, to %zu bytes", length);
    send_next(c, &command, set);
}

/* Call recvmsg(2) once; return the number of bytes received. */
static size_t receive(struct client *c, int flags)
{
    if (c->have == c->room) {
        c->room = c->room ? 4 * c->room : 4096;
        if (!(c->buffer = realloc(c->buffer, c->room)))
            fail("no memory");
    }
    char control[CMSG_SPACE(MAX_FDS * sizeof(int))];
    struct iovec part = {c->buffer + c->have, c->room - c->have};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t count = recvmsg(c->sock, &message, flags | MSG_CMSG_CLOEXEC);
    if (count <= 0)
        fail("no reply: %s", count ? strerror(errno) : "the server hung up");
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    for (; header; header = CMSG_NXTHDR(&message, header))
        for (size_t i = 0; CMSG_LEN((i + 1) * sizeof(int)) <= header->cmsg_len; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
            close(fd);
            c->passed++;
        }
    c->have += count;
    return count;
}

static void read_replies(struct client *c, int flags)
{
    size_t looked_at = c->have, at = 0, length;
    receive(c, flags);
    while (at < c->have && (length = whole_reply(s6, c->buffer + at, c->have - at, looked_at))) {
        answered(c, c->buffer + at, length);
        at += length;
        looked_at = 0;
    }
    memmove(c->buffer, c->buffer + at, c->have - at);
    c->have -= at;
}

static void read_line(struct client *c)
{
    while (!c->have || c->buffer[c->have - 1] != '\n')
        receive(c, 0);
    c->have = 0;
}

/* -- a run ---------------------------------------------------------------------------------- */

static void connect_to(struct client *c, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {PATIENCE, 0};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    c->sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->sock < 0 || connect(c->sock, (struct sockaddr *)&address, sizeof address))
        fail("cannot connect: %s", strerror(errno));
    setsockopt(c->sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(c->sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (!(c->ring = calloc(in_flight, sizeof *c->ring)))
        fail("no memory");
    if (!s6) {
        static const char negotiate[] = "{\"execute\": \"qmp_capabilities\"}\n";
        read_line(c);
        if (send(c->sock, negotiate, sizeof negotiate - 1, MSG_NOSIGNAL) < 0)
            fail("cannot send: %s", strerror(errno));
        read_line(c);
    }
}

/* Send commands on all connections until the run is over and every command is answered. */
static void run(struct client *all, int poll)
{
    struct epoll_event events[64];
    for (long i = 0; i < clients; i++)
        for (long n = 0; n < in_flight; n++)
            send_next(&all[i], NULL, 0);
    while (done < started)
        if (clients == 1)
            read_replies(all, 0);
        else
            for (int n = epoll_wait(poll, events, 64, PATIENCE * 1000); n-- > 0;)
                read_replies(events[n].data.ptr, MSG_DONTWAIT);
}

static int by_size(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(LONGEST_RUN);
    if (argc < 5)
        fail("usage: load SOCKET PID[,PID]... qmp|s6 WORK [NAME=NUMBER]...");
    pids = argv[2];
    s6 = !strcmp(argv[3], "s6");
    work = argv[4];
    serial = strcmp(work, "fill") ? 1000000 : 0; /* fill stores bench-0, bench-1 and so on */
    for (int i = 5; i < argc; i++) {
        size_t length = strcspn(argv[i], "="), known = 0;
        for (size_t n = 0; n < sizeof options / sizeof *options; n++)
            if (strlen(options[n].name) == length && !memcmp(options[n].name, argv[i], length)) {
                *options[n].value = atol(argv[i] + length + 1);
                known = 1;
            }
        if (!known)
            fail("unknown option %s", argv[i]);
    }
    char path[] = "/tmp/bench.XXXXXX"; /* the descriptor sent: O_RDWR, as that of a disk image */
    if ((file = mkostemp(path, O_CLOEXEC)) < 0 || unlink(path))
        fail("cannot make a file: %s", strerror(errno));
    max_waits = 1 << 21;
    waits = malloc(max_waits * sizeof *waits);
    sets = malloc((commands < 100000 ? commands + 1 : 100000) * sizeof *sets);
    struct client *all = calloc(clients, sizeof *all);
    int poll = epoll_create1(EPOLL_CLOEXEC);
    if (!waits || !sets || !all || poll < 0)
        fail("no memory");
    for (long i = 0; i < clients; i++) {
        connect_to(&all[i], argv[1]);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &all[i]};
        epoll_ctl(poll, EPOLL_CTL_ADD, all[i].sock, &event);
    }
    if (watch) {
        char name[100];
        snprintf(name, sizeof name, "/proc/%d/task/%d/schedstat", atoi(pids), atoi(pids));
        own_thread = open(name, O_RDONLY | O_CLOEXEC);
    }
    if (together || !strcmp(work, "idle")) {
        char line[100];
        puts("ready");
        fflush(stdout);
        if (read(0, line, sizeof line) < 0 || !strcmp(work, "idle"))
            return 0;
    }
    uint64_t cpu = 0, removal_cpu = 0, begun = now();
    int stock = !strcmp(work, "stock");
    deadline = begun + milliseconds * 1000000ull;
    do { /* stock repeats this until the deadline */
        uint64_t before = server_cpu(pids), between;
        started = done = n_sets = next_set = removing = 0;
        run(all, poll);
        between = server_cpu(pids);
        cpu += between - before;
        if (stock) {
            removing = 1;
            run(all, poll);
            removal_cpu += server_cpu(pids) - between;
        }
        total += done;
    } while (stock && now() < deadline);
    uint64_t elapsed = now() - begun;
    qsort(waits, n_waits, sizeof *waits, by_size);
    printf("{\"commands\": %ld, \"cpu_ns\": %lu, \"removal_cpu_ns\": %lu, \"elapsed_ns\": %lu, "
           "\"p50_ns\": %u, \"p99_ns\": %u, \"max_ns\": %lu, \"max_cpu_ns\": %lu}\n",
           total, cpu, removal_cpu, elapsed, n_waits ? waits[n_waits / 2] : 0,
           n_waits ? waits[n_waits * 99 / 100] : 0, slowest, slowest_cpu);
    return 0;
}
