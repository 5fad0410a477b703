/*
 * PID 1 until the agent is: loads the modules that a root disk and a channel need, mounts the root, makes all that a
 * machine needs before its first process, and executes the agent in its own place.
 *
 * In C and without a C library because it runs at every boot: under emulation each program is translated anew, and
 * a shell with its forks takes 0.2 s of a boot, and Python more than twice the 45 ms of `set_up_machine`, after
 * ctypes has been imported.  The image's builder compiles it by tcc.
 * Rule: no wait without an end.  What it cannot do it says on the console and restarts the machine, which ends a
 * VM that runs with -no-reboot.
 */

/* x86-64 system calls (asm/unistd_64.h) and their constants. */
enum { READ = 0, WRITE = 1, OPEN = 2, CLOSE = 3, IOCTL = 16, NANOSLEEP = 35, SOCKET = 41, EXECVE = 59, CHDIR = 80 };
enum { MKDIR = 83, UNLINK = 87, SYMLINK = 88, UMASK = 95, SYSINFO = 99, CHROOT = 161, MOUNT = 165, REBOOT = 169 };
enum { SETHOSTNAME = 170, FINIT_MODULE = 313 };
enum { CONSOLE = 2, O_WRONLY = 1, AF_INET = 2, SOCK_DGRAM = 2, SIOCSIFFLAGS = 0x8914, IFF_UP = 1 };
enum { RDONLY = 1, NOSUID = 2, NODEV = 4, NOEXEC = 8, MOVE = 8192 };
enum { REBOOT_MAGIC1 = 0xfee1dead, REBOOT_MAGIC2 = 672274793, REBOOT_RESTART = 0x01234567, REBOOT_NO_CAD = 0 };

/* The disk may take DISK_TRIES * 10 ms to appear after its driver was loaded; unless the host is badly overloaded
 * it is there at once. */
enum { DISK_TRIES = 500, MAX_ORDER = 4096 };

/* Memory that containers and processes together cannot have: the agent's own, its page cache, the kernel's. */
#define RESERVE (64L << 20)

/* /run holds what containers are made of, and is theirs to fill up to a share of the memory; what is in their
 * overlays (below /l) has a size of its own. */
static const struct { const char *source, *target, *kind; long flags; const char *options; } mounts[] = {
    { "proc", "/proc", "proc", NOSUID | NODEV | NOEXEC, "" },
    { "sys", "/sys", "sysfs", NOSUID | NODEV | NOEXEC, "" },
    { "run", "/run", "tmpfs", NOSUID | NODEV, "mode=0755,size=25%" },
    { "tmp", "/tmp", "tmpfs", NOSUID | NODEV, "mode=1777,size=25%" },
    { "layers", "/l", "tmpfs", NOSUID | NODEV, "mode=0700,size=1m" },
    { "devpts", "/dev/pts", "devpts", NOSUID | NOEXEC, "gid=5,mode=620,ptmxmode=666" },
    { "shm", "/dev/shm", "tmpfs", NOSUID | NODEV, "mode=1777,size=50%" },
    { "mqueue", "/dev/mqueue", "mqueue", NOSUID | NODEV | NOEXEC, "" },
    { "cgroup", "/sys/fs/cgroup", "cgroup2", NOSUID | NODEV | NOEXEC, "nsdelegate,memory_recursiveprot" },
};
static const char *const links[][2] = {
    { "/dev/fd", "/proc/self/fd" },
    { "/dev/stdin", "/proc/self/fd/0" },
    { "/dev/stdout", "/proc/self/fd/1" },
    { "/dev/stderr", "/proc/self/fd/2" },
};

#define CGROUPS "/sys/fs/cgroup/"
#define CONTROLLERS "+cpu +memory +pids +io"

/* Written in this order; a path that ends in '/' is a cgroup to make.  0 stands for the memory less the RESERVE. */
static const char *const settings[][2] = {
    /* Grace periods by interrupt instead of waiting 10 to 40 ms each; modules, cgroups and unmounting wait for them.
     * With a few processors the interrupts cost nothing. */
    { "/sys/kernel/rcu_expedited", "1" },
    { "/proc/sys/kernel/sysrq", "1" },  /* the host can have stacks through the console when the agent is stuck */
    { "/proc/sys/kernel/panic", "-1" }, /* a panic ends the VM at once */
    { "/proc/sys/net/ipv4/ping_group_range", "0 2147483647" }, /* without privileges, as container users expect */
    /* The processes of the VM, all containers, and the agent, of which 32 MiB, twice what it uses, are never
     * reclaimed. */
    { CGROUPS "cgroup.subtree_control", CONTROLLERS },
    { CGROUPS "processes/", "" },
    { CGROUPS "processes/memory.max", 0 },
    { CGROUPS "containers/", "" },
    { CGROUPS "containers/memory.max", 0 },
    { CGROUPS "containers/cgroup.subtree_control", CONTROLLERS },
    { CGROUPS "agent/", "" },
    { CGROUPS "agent/memory.min", "33554432" },
    { CGROUPS "agent/cgroup.procs", "1" },
};

#define LENGTH(array) (sizeof(array) / sizeof(array)[0])

static long call(long number, long a, long b, long c, long d, long e)
{
    long result;
    __asm__ volatile("movq %5, %%r10; movq %6, %%r8; syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "m"(d), "m"(e)
                     : "rcx", "r8", "r10", "r11", "memory");
    return result;
}

static long length(const char *text)
{
    const char *end = text;
    while (*end)
        end++;
    return end - text;
}

static void say(const char *text)
{
    call(WRITE, CONSOLE, (long)text, length(text), 0, 0);
}

static void fail(const char *what, const char *name, long error)
{
    char digits[] = " (errno 000)\n";
    int place;

    for (place = 10, error = -error; place >= 8; place--, error /= 10)
        digits[place] = '0' + error % 10;
    say("byre: initramfs: ");
    say(what);
    say(name);
    say(digits);
    call(REBOOT, REBOOT_MAGIC1, REBOOT_MAGIC2, REBOOT_RESTART, 0, 0);
    for (;;)
        ;
}

static void mount(const char *source, const char *target, const char *kind, long flags, const char *options)
{
    long error = call(MOUNT, (long)source, (long)target, (long)kind, flags, (long)options);
    if (error < 0)
        fail("cannot mount ", source, error);
}

/* `order` has a file name a line.  A module's memory is given back as soon as it is loaded. */
static void load_modules(void)
{
    static char order[MAX_ORDER];
    char *name, *end = order;
    long file = call(OPEN, (long)"/modules/order", 0, 0, 0, 0);
    long length = call(READ, file, (long)order, sizeof order - 1, 0, 0), error;

    if (length < 0)
        fail("cannot read ", "/modules/order", length);
    call(CLOSE, file, 0, 0, 0, 0);
    call(CHDIR, (long)"/modules", 0, 0, 0, 0);
    while (*end) {
        for (name = end; *end != '\n'; end++)
            ;
        *end++ = 0;
        file = call(OPEN, (long)name, 0, 0, 0, 0);
        error = call(FINIT_MODULE, file, (long)"", 0, 0, 0);
        if (error < 0)
            fail("cannot load the module ", name, error);
        call(CLOSE, file, 0, 0, 0, 0);
        call(UNLINK, (long)name, 0, 0, 0, 0);
    }
}

static void wait_for_disk(const char *disk)
{
    static long ten_milliseconds[] = { 0, 10000000 };
    long tries, file;

    for (tries = 0; (file = call(OPEN, (long)disk, 0, 0, 0, 0)) < 0; tries++) {
        if (tries == DISK_TRIES)
            fail("there is no root disk ", disk, file);
        call(NANOSLEEP, (long)ten_milliseconds, 0, 0, 0, 0);
    }
    call(CLOSE, file, 0, 0, 0, 0);
}

static void set(const char *path, const char *value)
{
    long error, file;

    if (path[length(path) - 1] == '/') {
        error = call(MKDIR, (long)path, 0755, 0, 0, 0);
    } else {
        error = file = call(OPEN, (long)path, O_WRONLY, 0, 0, 0);
        if (file >= 0)
            error = call(WRITE, file, (long)value, length(value), 0, 0);
        call(CLOSE, file, 0, 0, 0, 0);
    }
    if (error < 0)
        fail("cannot set ", path, error);
}

/* What is left of the memory, at least half of it, in decimal digits. */
static const char *memory_limit(void)
{
    static char digits[24];
    static struct { long uptime, loads[3], total, others[9]; } info; /* sysinfo(2); a unit is a byte */
    char *place = digits + sizeof digits - 1;
    long limit;

    call(SYSINFO, (long)&info, 0, 0, 0, 0);
    limit = info.total / 2 > RESERVE ? info.total - RESERVE : info.total / 2;
    for (; limit; limit /= 10)
        *--place = '0' + limit % 10;
    return place;
}

static void loopback_up(void)
{
    static struct { char name[16]; short flags; char rest[22]; } request = { "lo", IFF_UP }; /* struct ifreq */
    long file = call(SOCKET, AF_INET, SOCK_DGRAM, 0, 0, 0);
    long error = call(IOCTL, file, SIOCSIFFLAGS, (long)&request, 0, 0);
    if (error < 0)
        fail("cannot set up ", "lo", error);
    call(CLOSE, file, 0, 0, 0, 0);
}

static void enter_root(void)
{
    mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
    load_modules();
    wait_for_disk("/dev/vda");
    mount("/dev/vda", "/root", "squashfs", RDONLY, 0);
    mount("/dev", "/root/dev", "", MOVE, 0);
    call(CHDIR, (long)"/root", 0, 0, 0, 0);
    mount(".", "/", "", MOVE, 0);
    call(CHROOT, (long)".", 0, 0, 0, 0);
    call(CHDIR, (long)"/", 0, 0, 0, 0);
}

static void set_up_machine(void)
{
    const char *limit = memory_limit();
    long i;

    call(UMASK, 0022, 0, 0, 0, 0);
    for (i = 0; i < LENGTH(mounts); i++) {
        call(MKDIR, (long)mounts[i].target, 0755, 0, 0, 0); /* below /dev; the others are there */
        mount(mounts[i].source, mounts[i].target, mounts[i].kind, mounts[i].flags, mounts[i].options);
    }
    for (i = 0; i < LENGTH(links); i++)
        call(SYMLINK, (long)links[i][1], (long)links[i][0], 0, 0, 0);
    for (i = 0; i < LENGTH(settings); i++)
        set(settings[i][0], settings[i][1] ? settings[i][1] : limit);
    loopback_up();
    call(SETHOSTNAME, (long)"byre", 4, 0, 0, 0);
    call(REBOOT, REBOOT_MAGIC1, REBOOT_MAGIC2, REBOOT_NO_CAD, 0, 0);
}

void _start(void)
{
    /* UTF-8 without a locale's files, which would have to be opened and read; the agent's children get a locale. */
    static const char *arguments[] = { "/usr/bin/python3", "-I", "-S", "-E", "-X", "utf8",
                                       "/usr/lib/byre/agent.pyc", 0 };
    static const char *environment[] = { "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                                         "HOME=/root", "LC_ALL=C", 0 };

    enter_root();
    set_up_machine();
    fail("cannot execute ", arguments[0],
         call(EXECVE, (long)arguments[0], (long)arguments, (long)environment, 0, 0));
}
