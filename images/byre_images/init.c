/*
 * PID 1 of the initramfs: loads the modules that the root disk needs, mounts it read-only, hands over to the agent.
 *
 * In C and without a C library because it runs at every boot: under emulation each program is translated anew, and
 * a shell with its forks takes 0.2 s of a boot of 2.5 s.  The image's builder compiles it by tcc.
 * Rule: no wait without an end.  What it cannot do it says on the console and restarts the machine, which ends a
 * VM that runs with -no-reboot.
 */

/* x86-64 system calls (asm/unistd_64.h) and their constants. */
enum { READ = 0, WRITE = 1, OPEN = 2, CLOSE = 3, NANOSLEEP = 35, EXECVE = 59, CHDIR = 80, UNLINK = 87 };
enum { CHROOT = 161, MOUNT = 165, REBOOT = 169, FINIT_MODULE = 313 };
enum { CONSOLE = 2, MS_RDONLY = 1, MS_MOVE = 8192 };
enum { REBOOT_MAGIC1 = 0xfee1dead, REBOOT_MAGIC2 = 672274793, REBOOT_RESTART = 0x01234567 };

/* The disk may take DISK_TRIES * 10 ms to appear after its driver was loaded; unless the host is badly overloaded
 * it is there at once. */
enum { DISK_TRIES = 500, MAX_ORDER = 4096 };

static long call(long number, long a, long b, long c, long d, long e)
{
    long result;
    __asm__ volatile("movq %5, %%r10; movq %6, %%r8; syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "m"(d), "m"(e)
                     : "rcx", "r8", "r10", "r11", "memory");
    return result;
}

static void say(const char *text)
{
    const char *end = text;
    while (*end)
        end++;
    call(WRITE, CONSOLE, (long)text, end - text, 0, 0);
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

static void mount(const char *source, const char *target, const char *kind, long flags)
{
    long error = call(MOUNT, (long)source, (long)target, (long)kind, flags, 0);
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

void _start(void)
{
    static const char *arguments[] = { "/usr/bin/python3", "-I", "-S", "-E", "/usr/lib/byre/init.py", 0 };
    static const char *environment[] = { "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                                         "HOME=/root", "LANG=C.UTF-8", "TERM=linux", 0 };

    mount("devtmpfs", "/dev", "devtmpfs", 0);
    load_modules();
    wait_for_disk("/dev/vda");
    mount("/dev/vda", "/root", "squashfs", MS_RDONLY);
    mount("/dev", "/root/dev", "", MS_MOVE);
    call(CHDIR, (long)"/root", 0, 0, 0, 0);
    mount(".", "/", "", MS_MOVE);
    call(CHROOT, (long)".", 0, 0, 0, 0);
    call(CHDIR, (long)"/", 0, 0, 0, 0);
    fail("cannot execute ", arguments[0],
         call(EXECVE, (long)arguments[0], (long)arguments, (long)environment, 0, 0));
}
