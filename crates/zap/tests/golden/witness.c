/* The program of the golden images: it needs no file, no library and no loader, so that an image of it restarts on any
   x86-64 Linux. It makes some of everything, waits for SIGUSR1, and says whether all of it is as it was.

   gcc -static -nostdlib -nostartfiles -ffreestanding -fno-stack-protector -fno-pie -no-pie -Os -o witness witness.c */

typedef unsigned long word;

static long call(long number, word a, word b, word c, word d)
{
	long result;
	register word fourth __asm__("r10") = d;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth) : "rcx", "r11", "memory");
	return result;
}

static long call6(long number, word a, word b, word c, word d, word e, word f)
{
	long result;
	register word fourth __asm__("r10") = d;
	register word fifth __asm__("r8") = e;
	register word sixth __asm__("r9") = f;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(fifth), "r"(sixth)
			 : "rcx", "r11", "memory");
	return result;
}

enum { READ, WRITE, OPEN, MMAP = 9, SIGPROCMASK = 14, PREAD = 17, PIPE = 22, PAUSE = 34, GETPID = 39, SOCKETPAIR = 53,
       FORK = 57, EXIT = 60, KILL = 62, UNLINK = 87, UMASK = 95, SETSID = 112, SIGTIMEDWAIT = 128, EVENTFD = 290 };

static long length(const char *text)
{
	long n = 0;
	while (text[n])
		n++;
	return n;
}

static void say(const char *text)
{
	call(WRITE, 1, (word)text, length(text), 0);
}

static int same(const char *one, const char *other, long n)
{
	for (long i = 0; i < n; i++)
		if (one[i] != other[i])
			return 0;
	return 1;
}

static int failures;

static void check(const char *what, int holds)
{
	if (!holds) {
		say(what);
		say(" differs\n");
		failures++;
	}
}

static const char text[] = "what was written before";
static char memory[3 * 4096] = { 1 };

static void witness(void)
{
	char back[64];
	int ends[2], pair[2];
	call(PIPE, (word)ends, 0, 0, 0);
	call(WRITE, ends[1], (word)text, sizeof text, 0);
	call(SOCKETPAIR, 1, 1, 0, (word)pair);
	call(WRITE, pair[0], (word)text, sizeof text, 0);
	long file = call(OPEN, (word)"/tmp/file", 0102, 0600, 0);
	call(WRITE, file, (word)text, sizeof text, 0);
	long gone = call(OPEN, (word)"/tmp/gone", 0102, 0600, 0);
	call(WRITE, gone, (word)text, sizeof text, 0);
	call(UNLINK, (word)"/tmp/gone", 0, 0, 0);
	long event = call(EVENTFD, 41, 0, 0, 0);
	char *shared = (char *)call6(MMAP, 0, 8192, 3, 0x21, -1, 0);
	shared[5000] = 7;
	memory[9000] = 9;
	call(UMASK, 027, 0, 0, 0);
	long child = call(FORK, 0, 0, 0, 0);
	if (child == 0) {
		call(SETSID, 0, 0, 0, 0);
		shared[0] = 3;
		for (;;)
			call(PAUSE, 0, 0, 0, 0);
	}
	while (*(volatile char *)shared != 3)
		;
	long self = call(GETPID, 0, 0, 0, 0);
	word wanted = 1ul << 9;
	call(SIGPROCMASK, 0, (word)&wanted, 0, 8);
	say("ready\n");
	while (call(SIGTIMEDWAIT, (word)&wanted, 0, 0, 8) != 10)
		;
	check("pid", call(GETPID, 0, 0, 0, 0) == self);
	check("child", call(KILL, child, 0, 0, 0) == 0);
	check("pipe", call(READ, ends[0], (word)back, sizeof back, 0) == sizeof text && same(back, text, sizeof text));
	check("socket", call(READ, pair[1], (word)back, sizeof back, 0) == sizeof text && same(back, text, sizeof text));
	check("offset", call(READ, file, (word)back, sizeof back, 0) == 0);
	check("file", call(PREAD, file, (word)back, sizeof back, 0) == sizeof text && same(back, text, sizeof text));
	check("removed file", call(PREAD, gone, (word)back, sizeof back, 0) == sizeof text && same(back, text, sizeof text));
	check("event", call(READ, event, (word)back, 8, 0) == 8 && back[0] == 41);
	check("shared memory", shared[5000] == 7 && shared[0] == 3);
	check("memory", memory[0] == 1 && memory[9000] == 9);
	check("umask", call(UMASK, 0, 0, 0, 0) == 027);
	call(KILL, child, 9, 0, 0);
	if (!failures)
		say("ok\n");
	call(EXIT, failures, 0, 0, 0);
}

__attribute__((naked, noreturn)) void _start(void)
{
	__asm__("and $-16, %%rsp\n\tcall *%0" : : "r"(witness));
}
