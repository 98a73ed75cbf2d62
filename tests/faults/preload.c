/* Makes file operations below a folder fail or wait, or kills the process group at one of them; preload.py sets it up.

   FAULT_BELOW    operations on paths below this folder count; all others are left alone
   FAULT_KINDS    which operations count, words of: read open write fsync rename mkdir ("open" is to write)
   FAULT_LOG      file that gets a line for each: "passed" or "struck", process id, kind, path
   FAULT_AT       number of the first operation that is struck, counted from 1 in each process; 0 for none
   FAULT_FOR      how many are struck from there on; 0 for all
   FAULT_PERCENT  strikes each operation with this chance instead, as FAULT_SEED decides
   FAULT_ERROR    errno of the operations that are struck; 0 kills the process group with SIGKILL instead
   FAULT_SECONDS  delays them by so many seconds instead, and then lets them be done */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *below, *kinds, *log_file;
static long at, count, percent, seed, error, seconds, seen;

static long number(const char *name) {
  const char *text = getenv(name);
  return text ? atol(text) : 0;
}

__attribute__((constructor)) static void read_settings(void) {
  below = getenv("FAULT_BELOW"), kinds = getenv("FAULT_KINDS"), log_file = getenv("FAULT_LOG");
  at = number("FAULT_AT"), count = number("FAULT_FOR"), percent = number("FAULT_PERCENT");
  seed = number("FAULT_SEED"), error = number("FAULT_ERROR"), seconds = number("FAULT_SECONDS");
}

/* Writes with system calls, so that the log is not itself counted. */
static void note(const char *what, const char *kind, const char *path) {
  char line[PATH_MAX + 64];
  int size = snprintf(line, sizeof line, "%s %d %s %s\n", what, (int)getpid(), kind, path);
  int file = syscall(SYS_openat, AT_FDCWD, log_file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (file < 0) return;
  syscall(SYS_write, file, line, size);
  syscall(SYS_close, file);
}

/* Mixes the bits of seed and n (splitmix64), so that the chance does not depend on the order of threads. */
static int by_chance(long n) {
  unsigned long x = (unsigned long)seed * 0x9e3779b97f4a7c15ul + n * 0xbf58476d1ce4e5b9ul;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ul;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebul;
  return (long)((x ^ (x >> 31)) % 100) < percent;
}

/* Returns whether this operation must fail, and sets errno then. */
static int struck(const char *kind, const char *path) {
  if (!below || !kinds || !log_file || !strstr(kinds, kind)) return 0;
  size_t size = strlen(below);
  if (strncmp(path, below, size) || (path[size] && path[size] != '/')) return 0;
  int before = errno;
  long n = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
  int hit = percent ? by_chance(n) : at && n >= at && (!count || n < at + count);
  note(hit ? "struck" : "passed", kind, path);
  errno = before;
  if (!hit) return 0;
  if (seconds) return sleep(seconds), 0;
  if (!error) kill(0, SIGKILL);
  errno = (int)error;
  return 1;
}

/* Returns the absolute path of `name` in an open folder, or of an open file if `name` is empty. */
static const char *path_of(int file, const char *name, char *buffer) {
  char link[64] = "/proc/self/cwd";
  if (name[0] == '/') return name;
  if (file != AT_FDCWD) snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  int before = errno;
  ssize_t size = readlink(link, buffer, PATH_MAX - 1);
  errno = before;
  if (size < 0) size = 0;
  buffer[size] = 0;
  if (name[0]) snprintf(buffer + size, PATH_MAX - size, "/%s", name);
  return buffer;
}

#define NEXT(name) \
  static __typeof__(name) *next; \
  if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OPEN(name, folder, parameters, ...) \
  int name parameters { \
    NEXT(name); \
    char buffer[PATH_MAX]; \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    const char *kind = (flags & O_ACCMODE) == O_RDONLY ? "read" : "open"; \
    return struck(kind, path_of(folder, path, buffer)) ? -1 : next(__VA_ARGS__, mode); \
  }

#define ON_FILE(type, kind, name, parameters, ...) \
  type name parameters { \
    NEXT(name); \
    char buffer[PATH_MAX]; \
    return struck(kind, path_of(file, "", buffer)) ? -1 : next(__VA_ARGS__); \
  }

OPEN(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPEN(openat, folder, (int folder, const char *path, int flags, ...), folder, path, flags)
OPEN(openat64, folder, (int folder, const char *path, int flags, ...), folder, path, flags)
ON_FILE(ssize_t, "write", write, (int file, const void *data, size_t size), file, data, size)
ON_FILE(ssize_t, "write", writev, (int file, const struct iovec *parts, int count), file, parts, count)
ON_FILE(ssize_t, "write", pwrite, (int file, const void *data, size_t size, off_t to), file, data, size, to)
ON_FILE(ssize_t, "write", pwrite64, (int file, const void *data, size_t size, off64_t to), file, data, size, to)
ON_FILE(int, "fsync", fsync, (int file), file)
ON_FILE(int, "fsync", fdatasync, (int file), file)

int rename(const char *from, const char *to) {
  NEXT(rename);
  char buffer[PATH_MAX];
  return struck("rename", path_of(AT_FDCWD, to, buffer)) ? -1 : next(from, to);
}

int mkdir(const char *path, mode_t mode) {
  NEXT(mkdir);
  char buffer[PATH_MAX];
  return struck("mkdir", path_of(AT_FDCWD, path, buffer)) ? -1 : next(path, mode);
}
