/* Counts what a process and its children do to the files of one folder, and disturbs one operation.

   cc -shared -fPIC -O2 -o file_faults.so file_faults.c -ldl
   LD_PRELOAD=./file_faults.so FILE_FAULTS="NUMBER ACTION ROOT" FILE_FAULTS_RECORD=FILE program

   Counted are the operations that change files: opening to write, writing, renaming, removing, making
   folders and links, truncating, syncing. ACTION says what happens to number NUMBER (from 1; 0 for none):

     KILL    SIGKILL for the process, after half of a write
     EIO     this operation fails
     ENOSPC  this and every later operation that needs space fails: the disk stays full

   FILE_FAULTS_RECORD is a file of zeros that all processes share: the count, and a line for each operation. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define LINE 192
#define LINES 20000

typedef struct {
    unsigned long count;
    char lines[LINES][LINE];
} record_t;

static record_t *record;
static char root[PATH_MAX], action[16];
static size_t root_length;
static unsigned long chosen;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

/* The real function behind the wrapper of the same name. */
#define REAL(name)                                                                                           \
    static __typeof__(&name) real;                                                                           \
    if (!real) real = next(#name)

static void start(void) {
    const char *plan = getenv("FILE_FAULTS"), *path = getenv("FILE_FAULTS_RECORD");
    if (!plan || !path || sscanf(plan, "%lu %15s %4095[^\n]", &chosen, action, root) != 3) return;
    root_length = strlen(root);
    int (*real_open)(const char *, int, ...) = next("open");
    int file = real_open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return;
    void *shared = mmap(NULL, sizeof(record_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (shared != MAP_FAILED) record = shared;
}

/* The path of an open file; of a folder for the functions that end in `at`. */
static const char *path_of(int file, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

static const char *absolute(int folder, const char *path, char *buffer) {
    if (!path) return "";
    if (*path == '/') return path;
    char base[PATH_MAX];
    if (folder != AT_FDCWD)
        path_of(folder, base);
    else if (!getcwd(base, sizeof base))
        *base = 0;
    snprintf(buffer, PATH_MAX, "%s/%s", base, path);
    return buffer;
}

/* Counts an operation. Returns 0 to go on, -1 to fail with errno set, 1 to die after half of it. */
static int disturbed(const char *name, const char *path, int needs_space) {
    int kept = errno;
    pthread_once(&once, start);
    if (!record || strncmp(path, root, root_length) || (path[root_length] && path[root_length] != '/')) {
        errno = kept;
        return 0;
    }
    unsigned long number = __atomic_add_fetch(&record->count, 1, __ATOMIC_SEQ_CST);
    if (number <= LINES)
        snprintf(record->lines[number - 1], LINE, "%d %s %s", getpid(), name, path + root_length);
    errno = kept;
    if (!chosen || number < chosen) return 0;
    if (!strcmp(action, "ENOSPC") && needs_space) return errno = ENOSPC, -1;
    if (number > chosen) return 0;
    if (!strcmp(action, "EIO")) return errno = EIO, -1;
    return !strcmp(action, "KILL");
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* What every wrapper but those of writes does first. */
#define DISTURB(failed, path, space)                                                                         \
    switch (disturbed(__func__, path, space)) {                                                              \
    case -1: return failed;                                                                                  \
    case 1: die();                                                                                           \
    }

static int absent(const char *path) {
    int kept = errno, found = access(path, F_OK);
    errno = kept;
    return found != 0;
}

static int writes(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); }

#define MODE                                                                                                 \
    mode_t mode = 0;                                                                                         \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                     \
        va_list rest;                                                                                        \
        va_start(rest, flags);                                                                               \
        mode = va_arg(rest, mode_t);                                                                         \
        va_end(rest);                                                                                        \
    }

#define OPEN(name)                                                                                           \
    int name(const char *path, int flags, ...) {                                                             \
        REAL(name);                                                                                          \
        MODE char buffer[PATH_MAX];                                                                          \
        const char *full = absolute(AT_FDCWD, path, buffer);                                                 \
        if (writes(flags)) DISTURB(-1, full, (flags & O_CREAT) && absent(full))                              \
        return real(path, flags, mode);                                                                      \
    }

#define OPENAT(name)                                                                                         \
    int name(int folder, const char *path, int flags, ...) {                                                 \
        REAL(name);                                                                                          \
        MODE char buffer[PATH_MAX];                                                                          \
        const char *full = absolute(folder, path, buffer);                                                   \
        if (writes(flags)) DISTURB(-1, full, (flags & O_CREAT) && absent(full))                              \
        return real(folder, path, flags, mode);                                                              \
    }

#define FOPEN(name)                                                                                          \
    FILE *name(const char *path, const char *mode) {                                                         \
        REAL(name);                                                                                          \
        char buffer[PATH_MAX];                                                                               \
        const char *full = absolute(AT_FDCWD, path, buffer);                                                 \
        if (strpbrk(mode, "wa+")) DISTURB(NULL, full, absent(full))                                          \
        return real(path, mode);                                                                             \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

/* Writes half if the process is to die in it. `half` is a call that writes that much. */
#define WRITE(file, half)                                                                                    \
    char buffer[PATH_MAX];                                                                                   \
    int kept = errno;                                                                                        \
    const char *path = path_of(file, buffer);                                                                \
    errno = kept;                                                                                            \
    switch (disturbed(__func__, path, 1)) {                                                                  \
    case -1: return -1;                                                                                      \
    case 1: half; die();                                                                                     \
    }

ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    WRITE(file, real(file, data, size / 2))
    return real(file, data, size);
}

#define PWRITE(name, offset_t)                                                                               \
    ssize_t name(int file, const void *data, size_t size, offset_t at) {                                     \
        REAL(name);                                                                                          \
        WRITE(file, real(file, data, size / 2, at))                                                          \
        return real(file, data, size, at);                                                                   \
    }

PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev);
    WRITE(file, real(file, parts, count / 2))
    return real(file, parts, count);
}

ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) {
    REAL(pwritev);
    WRITE(file, real(file, parts, count / 2, at))
    return real(file, parts, count, at);
}

ssize_t sendfile(int file, int source, off_t *at, size_t size) {
    REAL(sendfile);
    WRITE(file, real(file, source, at, size / 2))
    return real(file, source, at, size);
}

ssize_t sendfile64(int file, int source, off64_t *at, size_t size) {
    REAL(sendfile64);
    WRITE(file, real(file, source, at, size / 2))
    return real(file, source, at, size);
}

ssize_t copy_file_range(int source, off64_t *from, int file, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range);
    WRITE(file, real(source, from, file, to, size / 2, flags))
    return real(source, from, file, to, size, flags);
}

/* Functions of one path, or of one open file. */
#define ONE(name, arguments, values, path, space)                                                            \
    int name arguments {                                                                                     \
        REAL(name);                                                                                          \
        char buffer[PATH_MAX];                                                                               \
        const char *full = path;                                                                             \
        DISTURB(-1, full, space)                                                                             \
        return real values;                                                                                  \
    }

#define HERE(path) absolute(AT_FDCWD, path, buffer)

ONE(mkdir, (const char *path, mode_t mode), (path, mode), HERE(path), absent(full))
ONE(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), absolute(folder, path, buffer), absent(full))
ONE(unlink, (const char *path), (path), HERE(path), 0)
ONE(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), absolute(folder, path, buffer), 0)
ONE(rmdir, (const char *path), (path), HERE(path), 0)
ONE(remove, (const char *path), (path), HERE(path), 0)
ONE(rename, (const char *from, const char *to), (from, to), HERE(to), 0)
ONE(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), absolute(b, to, buffer), 0)
ONE(renameat2, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags),
    absolute(b, to, buffer), 0)
ONE(link, (const char *from, const char *to), (from, to), HERE(to), absent(full))
ONE(linkat, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags),
    absolute(b, to, buffer), absent(full))
ONE(symlink, (const char *from, const char *to), (from, to), HERE(to), absent(full))
ONE(symlinkat, (const char *from, int folder, const char *to), (from, folder, to), absolute(folder, to, buffer), absent(full))
ONE(truncate, (const char *path, off_t size), (path, size), HERE(path), 0)
ONE(truncate64, (const char *path, off64_t size), (path, size), HERE(path), 0)
ONE(ftruncate, (int file, off_t size), (file, size), path_of(file, buffer), 0)
ONE(ftruncate64, (int file, off64_t size), (file, size), path_of(file, buffer), 0)
ONE(fallocate, (int file, int mode, off_t at, off_t size), (file, mode, at, size), path_of(file, buffer), 1)
ONE(fallocate64, (int file, int mode, off64_t at, off64_t size), (file, mode, at, size), path_of(file, buffer), 1)
ONE(fsync, (int file), (file), path_of(file, buffer), 0)
ONE(fdatasync, (int file), (file), path_of(file, buffer), 0)
