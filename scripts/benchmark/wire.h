/* The two protocols of load.c, QMP and s6-fdholder, and the server's CPU time from /proc. */
#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum kind { ADD, REMOVE, QUERY, OPEN };

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t cpu_of(int schedstat)
{
    char text[100] = "";
    if (pread(schedstat, text, sizeof text - 1, 0) <= 0)
        return 0; /* the thread has ended */
    return strtoull(text, NULL, 10);
}

/* CPU time of all threads of a process, in nanoseconds (proc(5), schedstat). */
static uint64_t process_cpu(int pid)
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

/* CPU time of several processes; their ids are separated by commas. */
static uint64_t server_cpu(const char *pids)
{
    uint64_t sum = 0;
    for (const char *at = pids; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        sum += process_cpu(atoi(at));
    return sum;
}

/* -- requests: written into *text*; the functions return the length -------------------------- */

static size_t write_qmp(char *text, enum kind kind, long set, long fds)
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

/* Frame of s6-fdholder: 4 bytes of length, 2 bytes of the number of descriptors, big-endian. */
static size_t write_s6(char *text, enum kind kind, long set)
{
    char *p = text + 6, id[40];
    int length = sprintf(id, "bench-%ld", kind == OPEN ? 0 : set);
    *p++ = "SDLR"[kind];
    if (kind == ADD) {
        memcpy(p, "\x60\0\0\0\x70\0\0\0\0\0\0\0", 12); /* expiry: a TAI64N label far ahead */
        p += 12;
    }
    if (kind == OPEN)
        *p++ = 0; /* retrieve without deleting */
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

/* Return the length of the first reply in *text*; 0 if that is not complete. */
static size_t whole_reply(int s6, const char *text, size_t length, size_t looked_at)
{
    if (s6) {
        const unsigned char *p = (const unsigned char *)text;
        size_t whole = length < 6 ? 0 : 6 + (p[0] << 24 | p[1] << 16 | p[2] << 8 | p[3]);
        return whole <= length ? whole : 0;
    }
    const char *end = memchr(text + looked_at, '\n', length - looked_at);
    return end ? end + 1 - text : 0;
}
