/* Make the n-th system call that changes files under a folder fail, be cut short, or be hit by a signal.

   Loaded by LD_PRELOAD, so that it sees the calls of Python, MLX, SQLite and safetensors alike. The counter and the log
   are in a file that all processes map: also one that a disturbed process executes with LD_PRELOAD still set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, FAIL, FAIL_ALL, SHORT, SIGNAL };

static struct {
  pid_t owner, child; /* the owner is never disturbed itself; its child is what it runs */
  int mode, error;
  long at, seen;
  size_t used;
  char folder[4096], kept[4096], log[1 << 20];
} *shared;

__attribute__((constructor)) static void start(void) {
  const char *name = getenv("LLAMA3V_FAULTS_STATE");
  int file = name ? open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
  if (file < 0 || ftruncate(file, sizeof *shared)) return;
  void *mapped = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (mapped == MAP_FAILED) return;
  shared = mapped;
  if (!shared->owner) shared->owner = getpid();
}

void faults_arm(const char *folder, const char *kept, int mode, long at, int error) {
  snprintf(shared->folder, sizeof shared->folder, "%s", folder);
  snprintf(shared->kept, sizeof shared->kept, "%s", kept);
  memset(shared->log, 0, sizeof shared->log);
  shared->seen = shared->used = 0;
  shared->child = getpid();
  shared->at = at, shared->error = error, shared->mode = mode;
}

long faults_seen(void) { shared->mode = OFF; return shared->seen; }
const char *faults_log(void) { return shared->log; }

static int ours(const char *path) {
  if (path[0] != '/') return 1; /* children run in the folder */
  return !strncmp(path, shared->folder, strlen(shared->folder));
}

static int path_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, 4095);
  path[length > 0 ? length : 0] = 0;
  return length > 0 && path[0] == '/' && ours(path);
}

static __thread long number; /* of the thread's last call */

static void note(const char *call, const char *one, const char *other) {
  char line[9000];
  int n = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", number, call, one, other);
  size_t start = __atomic_fetch_add(&shared->used, n, __ATOMIC_SEQ_CST);
  if (start + n < sizeof shared->log) memcpy(shared->log + start, line, n);
}

/* Send the signal to this process; where files are kept, power is lost, and no other process goes on either. */
static void raise_it(const char *path) {
  note("signal", path, "");
  if (shared->kept[0]) kill(shared->child, shared->error);
  kill(getpid(), shared->error);
}

/* Whether this call is to fail; for SIGNAL the signal arrives before the call. */
static int hit(const char *call, const char *one, const char *other) {
  long n = number = __atomic_add_fetch(&shared->seen, 1, __ATOMIC_SEQ_CST);
  int ends_all = shared->mode == FAIL_ALL || (shared->mode == SIGNAL && shared->kept[0]);
  int now = ends_all ? n >= shared->at : n == shared->at;
  if (now && shared->mode == SIGNAL) { raise_it(one); now = 0; }
  if (now && (shared->mode == FAIL || shared->mode == FAIL_ALL)) { note("failed", one, call); errno = shared->error; return 1; }
  if (!now || shared->mode != SHORT) note(call, one, other);
  return now && shared->mode == SHORT ? 2 : 0;
}

/* Keep what a file is like at this call, under its number: a copy, or a link before it is replaced or removed. */
static void keep(const char *path, int copies) {
  struct stat found;
  char kept[5000], data[1 << 16];
  if (!shared->kept[0] || lstat(path, &found) || !S_ISREG(found.st_mode)) return;
  snprintf(kept, sizeof kept, "%s/%ld", shared->kept, number);
  if (!copies) { link(path, kept); return; }
  int from = open(path, O_RDONLY), to = open(kept, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  for (ssize_t n; (n = read(from, data, sizeof data)) > 0;) write(to, data, n);
  close(from), close(to);
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define ACTIVE (shared && shared->mode != OFF && getpid() != shared->owner)

#define WRITE(name, offset_type, declare, pass)                                                   \
  ssize_t name(int fd, const void *data, size_t size declare) {                                   \
    NEXT(name);                                                                                   \
    char path[4096];                                                                              \
    if (ACTIVE && path_of(fd, path)) {                                                            \
      int verdict = hit("write", path, "");                                                       \
      if (verdict == 1) return -1;                                                                \
      if (verdict == 2) size = size > 1 ? size / 2 : size;                                        \
    }                                                                                             \
    return next(fd, data, size pass);                                                             \
  }
#define COMMA ,
WRITE(write, , , )
WRITE(pwrite, off_t, COMMA off_t offset, COMMA offset)
WRITE(pwrite64, off64_t, COMMA off64_t offset, COMMA offset)

ssize_t writev(int fd, const struct iovec *parts, int count) {
  NEXT(writev);
  char path[4096];
  if (ACTIVE && path_of(fd, path) && hit("write", path, "") == 1) return -1;
  return next(fd, parts, count);
}

#define ON_FD(name, call, syncs, declare, pass)                                                   \
  int name(int fd declare) {                                                                      \
    NEXT(name);                                                                                   \
    char path[4096];                                                                              \
    if (!ACTIVE || !path_of(fd, path)) return next(fd pass);                                      \
    if (hit(call, path, "") == 1) return -1;                                                      \
    int result = next(fd pass);                                                                   \
    if (syncs && !result) keep(path, 1);                                                          \
    return result;                                                                                \
  }
ON_FD(fsync, "sync", 1, , )
ON_FD(fdatasync, "sync", 1, , )
ON_FD(ftruncate, "truncate", 0, COMMA off_t size, COMMA size)
ON_FD(ftruncate64, "truncate", 0, COMMA off64_t size, COMMA size)

#define ON_PATH(name, call, declare, pass)                                                        \
  int name(const char *path declare) {                                                            \
    NEXT(name);                                                                                   \
    if (!ACTIVE || !ours(path)) return next(path pass);                                           \
    if (hit(call, path, "") == 1) return -1;                                                      \
    if (call[0] == 'u') keep(path, 0);                                                            \
    return next(path pass);                                                                       \
  }
ON_PATH(mkdir, "mkdir", COMMA mode_t mode, COMMA mode)
ON_PATH(unlink, "unlink", , )
ON_PATH(rmdir, "unlink", , )

int unlinkat(int folder, const char *path, int flags) {
  NEXT(unlinkat);
  char whole[8300] = "";
  if (folder != AT_FDCWD && path[0] != '/' && path_of(folder, whole)) strcat(whole, "/");
  strcat(whole, path);
  if (!ACTIVE || !ours(whole)) return next(folder, path, flags);
  if (hit("unlink", whole, "") == 1) return -1;
  keep(whole, 0);
  return next(folder, path, flags);
}

#define ON_TWO(name, call)                                                                        \
  int name(const char *from, const char *to) {                                                    \
    NEXT(name);                                                                                   \
    if (!ACTIVE || !ours(to)) return next(from, to);                                              \
    if (hit(call, from, to) == 1) return -1;                                                      \
    if (call[0] == 'r') keep(to, 0);                                                              \
    return next(from, to);                                                                        \
  }
ON_TWO(rename, "rename")
ON_TWO(link, "link")
ON_TWO(symlink, "symlink")

#define OPEN(name)                                                                                \
  int name(const char *path, int flags, ...) {                                                    \
    NEXT(name);                                                                                   \
    mode_t mode = 0;                                                                              \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                        \
      va_list rest;                                                                               \
      va_start(rest, flags);                                                                      \
      mode = va_arg(rest, mode_t);                                                                \
      va_end(rest);                                                                               \
    }                                                                                             \
    if (ACTIVE && (flags & O_CREAT) && ours(path) && hit("create", path, "") == 1) return -1;     \
    return next(path, flags, mode);                                                               \
  }
OPEN(open)
OPEN(open64)
