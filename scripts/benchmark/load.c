/* The clients of the bench: any number of them, in one thread, each with so many commands in
 * flight.  In C, so that they cost little beside the server that is measured.
 *
 *     load SOCKET PID qmp|s6 WORK [NAME=NUMBER]...
 *
 * WORK is pair (add-fd, then remove-fd of what was added), fill (add-fd, and leave it there),
 * stock (add all, then remove all), query, open, or idle (connect, say so, wait for the end of
 * standard input).  At the end there is one line of JSON on standard output: how many commands,
 * the CPU time of all threads of the server PID meanwhile, and how long the replies took.  Every
 * reply is checked.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
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

enum { MAX_FDS = 253, PATIENCE = 20, LONGEST_RUN = 120 };
enum kind { ADD, REMOVE, QUERY, OPEN };

struct command { /* one that is not answered yet */
    uint64_t sent, server_cpu;
    long set;
    enum kind kind;
};

struct client {
    int sock;
    char *buffer;
    size_t have, room;
    struct command *ring; /* answered in order */
    long head, count;
    int passed; /* descriptors that came with replies */
};

/* The options, and what they are when nothing is said. */
static long clients = 1, in_flight = 1, commands = 1000000000, milliseconds = 60000, fds = 1,
            expect = -1, watch = 0, together = 0; /* beside a second load client */
static const struct { const char *name; long *value; } options[] = {
    {"clients", &clients}, {"in-flight", &in_flight}, {"commands", &commands},
    {"milliseconds", &milliseconds}, {"fds", &fds}, {"expect", &expect}, {"watch", &watch},
    {"together", &together},
};

static int s6, file, pid, own_thread = -1;
static const char *work;
static uint64_t deadline, slowest, slowest_cpu;
static long started, done, serial; /* with s6, the client names what it stores */
static long *sets; /* with stock: what was added */
static long n_sets, next_set, removing;
static uint32_t *waits; /* nanoseconds of each reply */
static size_t n_waits, max_waits;
static size_t listing; /* length of the first reply to a query */

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t cpu_of(int schedstat)
{
    char text[100] = "";
    if (pread(schedstat, text, sizeof text - 1, 0) <= 0)
        return 0; /* the thread has ended */
    return strtoull(text, NULL, 10);
}

/* What all threads of the server have used (proc(5), schedstat: nanoseconds). */
static uint64_t server_cpu(void)
{
    char path[300];
    uint64_t sum = 0;
    struct dirent *entry;
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    if (!tasks)
        fail("the server is gone");
    while ((entry = readdir(tasks))) {
        snprintf(path, sizeof path, "/proc/%d/task/%s/schedstat", pid, entry->d_name);
        int schedstat = entry->d_name[0] == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        if (schedstat >= 0) {
            sum += cpu_of(schedstat);
            close(schedstat);
        }
    }
    closedir(tasks);
    return sum;
}

/* -- requests ------------------------------------------------------------------------------- */

static size_t write_qmp(char *text, enum kind kind, long set)
{
    switch (kind) {
    case ADD:
        return sprintf(text, "{\"execute\": \"%s\"}\n", fds > 1 ? "add-fds" : "add-fd");
    case REMOVE:
        return sprintf(text, "{\"execute\": \"remove-fd\", \"arguments\": {\"fdset-id\": %ld}}\n",
                       set);
    case QUERY:
        return sprintf(text, "{\"execute\": \"query-fdsets\"}\n");
    default:
        return sprintf(text, "{\"execute\": \"open-fdset\", \"arguments\": {\"fdset-id\": 0}}\n");
    }
}

/* Its frame: four bytes of length, two of a number of descriptors, both big-endian. */
static size_t write_s6(char *text, enum kind kind, long set)
{
    char *p = text + 6, id[40];
    int length = sprintf(id, "bench-%ld", kind == OPEN ? 0 : set);
    *p++ = "SDLR"[kind];
    if (kind == ADD) {
        memcpy(p, "\x60\0\0\0\x70\0\0\0\0\0\0\0", 12); /* kept for ever: a TAI64N far ahead */
        p += 12;
    }
    if (kind == OPEN)
        *p++ = 0; /* and do not delete it */
    if (kind != QUERY) {
        *p++ = length;
        memcpy(p, id, length + 1);
        p += length + 1;
    }
    memcpy(text, "\0\0\0\0\0\0", 6);
    text[3] = p - text - 6;
    text[5] = kind == ADD;
    return p - text;
}

static void send_command(struct client *c, enum kind kind, long set)
{
    char text[200], control[CMSG_SPACE(MAX_FDS * sizeof(int))];
    if (s6 && kind == ADD)
        set = serial++;
    struct iovec part = {text, s6 ? write_s6(text, kind, set) : write_qmp(text, kind, set)};
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

/* Send whatever is next, if anything is. */
static void send_next(struct client *c, const struct command *last, long set)
{
    int over = started >= commands || now() >= deadline;
    if (!strcmp(work, "stock")) {
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

static long number_after(const char *text, size_t length, const char *name)
{
    const char *found = memmem(text, length, name, strlen(name));
    if (!found)
        fail("no %s in the reply: %.*s", name, length > 200 ? 200 : (int)length, text);
    return strtol(found + strlen(name), NULL, 10);
}

static long count_of(const char *text, size_t length, const char *name)
{
    long count = 0;
    for (const char *at = text; (at = memmem(at, text + length - at, name, strlen(name))); at++)
        count++;
    return count;
}

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
    if (s6 ? length < 7 || text[6] : length < 12 || memcmp(text, "{\"return\": ", 11))
        fail("an error: %.*s", length > 200 ? 200 : (int)length, s6 ? "(s6)" : text);
    if (command.kind == ADD && !s6) {
        set = number_after(text, length, "\"fdset-id\": ");
        number_after(text, length, "\"fd\": ");
    }
    if (command.kind == OPEN && c->passed-- < 1)
        fail("no descriptor came with the reply");
    if (command.kind == QUERY && !listing) {
        listing = length;
        long found = s6 ? count_of(text, length, "bench-") : count_of(text, length, "\"fd\": ");
        if (expect >= 0 && found != expect && found != expect + together)
            fail("%ld descriptors are listed, not %ld", found, expect);
    } else if (command.kind == QUERY && length != listing && !together)
        fail("the listing has changed, to %zu bytes", length);
    send_next(c, &command, set);
}

/* The length of the reply that *text* begins with; 0 if it is not complete. */
static size_t whole_reply(const char *text, size_t length, size_t looked_at)
{
    if (s6) {
        const unsigned char *p = (const unsigned char *)text;
        size_t whole = length < 6 ? 0 : 6 + (p[0] << 24 | p[1] << 16 | p[2] << 8 | p[3]);
        return whole <= length ? whole : 0;
    }
    const char *end = memchr(text + looked_at, '\n', length - looked_at);
    return end ? end + 1 - text : 0;
}

/* Read once; how many bytes came. */
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
    while (at < c->have && (length = whole_reply(c->buffer + at, c->have - at, looked_at))) {
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

/* Commands on all connections, until there are no more to send and all are answered. */
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
        fail("usage: load SOCKET PID qmp|s6 WORK [NAME=NUMBER]...");
    pid = atoi(argv[2]);
    s6 = !strcmp(argv[3], "s6");
    work = argv[4];
    serial = strcmp(work, "fill") ? 1000000 : 0; /* what was filled in is bench-0, and so on */
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
    char path[] = "/tmp/bench.XXXXXX"; /* what is passed: a file, open for both, as a disk image */
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
        snprintf(name, sizeof name, "/proc/%d/task/%d/schedstat", pid, pid);
        own_thread = open(name, O_RDONLY | O_CLOEXEC);
    }
    char rest[100];
    if (together || !strcmp(work, "idle")) {
        puts("ready");
        fflush(stdout);
        while (read(0, rest, sizeof rest) > 0 && strcmp(work, "idle"))
            break;
        while (!strcmp(work, "idle") && read(0, rest, sizeof rest) > 0)
            ;
    }
    uint64_t cpu = server_cpu(), begun = now(), removal_cpu = 0;
    deadline = begun + milliseconds * 1000000ull;
    run(all, poll);
    uint64_t elapsed = now() - begun;
    cpu = server_cpu() - cpu;
    if (!strcmp(work, "stock")) {
        removal_cpu = server_cpu();
        removing = 1;
        run(all, poll);
        removal_cpu = server_cpu() - removal_cpu;
    }
    qsort(waits, n_waits, sizeof *waits, by_size);
    printf("{\"commands\": %ld, \"cpu_ns\": %lu, \"removal_cpu_ns\": %lu, \"elapsed_ns\": %lu, "
           "\"p50_ns\": %u, \"p99_ns\": %u, \"max_ns\": %lu, \"max_cpu_ns\": %lu}\n",
           done, cpu, removal_cpu, elapsed, n_waits ? waits[n_waits / 2] : 0,
           n_waits ? waits[n_waits * 99 / 100] : 0, slowest, slowest_cpu);
    return 0;
}
