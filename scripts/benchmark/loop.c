/* Lower bound in C: a server that makes the system calls and nothing else.  The server closes every
 * received descriptor, and answers each line with the same text, whatever the command.
 *
 *     loop SOCKET
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { MAX_FDS = 253 };

static const char greeting[] = "{\"QMP\": {}}\r\n";
static const char reply[] = "{\"return\": {\"fdset-id\": 0, \"fd\": 9}}\r\n";

/* Receive once and answer every line; return 0 when the client has disconnected. */
static int serve(int client)
{
    static char text[1 << 16], replies[1 << 16];
    char control[CMSG_SPACE(MAX_FDS * sizeof(int))];
    struct iovec part = {text, sizeof text};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t count = recvmsg(client, &message, MSG_CMSG_CLOEXEC);
    if (count <= 0)
        return 0;
    for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header;
         header = CMSG_NXTHDR(&message, header))
        for (size_t i = 0; CMSG_LEN((i + 1) * sizeof(int)) <= header->cmsg_len; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(header) + i * sizeof fd, sizeof fd);
            close(fd);
        }
    size_t length = 0;
    for (char *at = text; (at = memchr(at, '\n', text + count - at)); at++) {
        memcpy(replies + length, reply, sizeof reply - 1);
        length += sizeof reply - 1;
    }
    return !length || send(client, replies, length, MSG_NOSIGNAL) == (ssize_t)length;
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct epoll_event events[64], event = {.events = EPOLLIN};
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), poll = epoll_create1(0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc != 2)
        return 2;
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    event.data.fd = listener;
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)
        || epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event)) {
        perror("loop");
        return 1;
    }
    for (;;)
        for (int n = epoll_wait(poll, events, 64, -1); n-- > 0;) {
            int fd = events[n].data.fd;
            if (fd != listener) {
                if (!serve(fd))
                    close(fd);
                continue;
            }
            event.data.fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
            if (event.data.fd < 0)
                return 1;
            if (send(event.data.fd, greeting, sizeof greeting - 1, MSG_NOSIGNAL) < 0
                || epoll_ctl(poll, EPOLL_CTL_ADD, event.data.fd, &event))
                close(event.data.fd);
        }
}
