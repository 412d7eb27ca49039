"""The system-call filter of the code sandbox: a seccomp program that lets through what Python needs, and nothing else.

A list of what is allowed, so that a call which the next kernel invents is refused too. Refused calls return an error to
the program (EPERM; ENOSYS for calls newer than this list, which makes libraries fall back). No sockets, no namespaces,
no mounts, no ptrace, no keyrings, no io_uring, no BPF, no shared memory of the System V kind, no memory files.

Sources: seccomp(2), seccomp_unotify(2); numbers from asm/unistd_64.h and asm-generic/unistd.h of Linux 6.1.
"""

from __future__ import annotations

import errno
import struct

ALLOWED = """
read:0:63 write:1:64 open:2:- close:3:57 stat:4:- fstat:5:80 lstat:6:- poll:7:- lseek:8:62 pread64:17:67
pwrite64:18:68 readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70 preadv2:327:286 pwritev2:328:287 access:21:-
pipe:22:- pipe2:293:59 select:23:- pselect6:270:72 ppoll:271:73 dup:32:23 dup2:33:- dup3:292:24 sendfile:40:71
fcntl:72:25 flock:73:32 fsync:74:82 fdatasync:75:83 truncate:76:45 ftruncate:77:46 fallocate:285:47 getdents:78:-
getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82:- renameat:264:38 renameat2:316:276 mkdir:83:-
mkdirat:258:34 rmdir:84:- creat:85:- link:86:- linkat:265:37 unlink:87:- unlinkat:263:35 symlink:88:- symlinkat:266:36
readlink:89:- readlinkat:267:78 chmod:90:- fchmod:91:52 fchmodat:268:53 umask:95:166 utime:132:- utimes:235:-
utimensat:280:88 futimesat:261:- mknod:133:- mknodat:259:33 statfs:137:43 fstatfs:138:44 fadvise64:221:223
readahead:187:213 openat:257:56 openat2:437:437 newfstatat:262:79 statx:332:291 faccessat:269:48 faccessat2:439:439
copy_file_range:326:285 close_range:436:436 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11
llistxattr:195:12 flistxattr:196:13 ioctl:16:29
mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214 mremap:25:216 msync:26:227 mincore:27:232 madvise:28:233
membarrier:324:283
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:- restart_syscall:219:128 signalfd:282:- signalfd4:289:74
kill:62:129 tkill:200:130 tgkill:234:131 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240 pidfd_send_signal:424:424
nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201:-
times:100:153 getitimer:36:102 setitimer:38:103 alarm:37:- timer_create:222:107 timer_settime:223:110
timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111 timerfd_create:283:85 timerfd_settime:286:86
timerfd_gettime:287:87
getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177
getgroups:115:158 getresuid:118:148 getresgid:120:150 setpgid:109:154 getpgid:121:155 getpgrp:111:- getsid:124:156
setsid:112:157 uname:63:160 getrlimit:97:163 setrlimit:160:164 prlimit64:302:261 getrusage:98:165 sysinfo:99:179
getpriority:140:141 setpriority:141:140 sched_yield:24:124 sched_getparam:143:121 sched_getscheduler:145:120
sched_get_priority_max:146:125 sched_get_priority_min:147:126 sched_rr_get_interval:148:127 sched_getaffinity:204:123
sched_setaffinity:203:122 sched_getattr:315:275 getcpu:309:168 clone:56:220 fork:57:- vfork:58:- execve:59:221
execveat:322:281 exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 pidfd_open:434:434 set_tid_address:218:96
futex:202:98 set_robust_list:273:99 get_robust_list:274:100 rseq:334:293 arch_prctl:158:- prctl:157:167
getrandom:318:278 capget:125:90
eventfd:284:- eventfd2:290:19 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:-
epoll_pwait:281:22 epoll_pwait2:441:441
socketpair:53:199 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 shutdown:48:210 getsockopt:55:209
setsockopt:54:208 getsockname:51:204 getpeername:52:205
"""
"""name:number on x86_64:number on aarch64"""

PROCESSES = {"kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "fork", "vfork"}
"""Signals and new processes: harmless inside a process-id namespace, where there is nobody else to hit, and which is
killed as a whole."""

NEWEST_KNOWN = 450
"""Calls above this number did not exist when the list was made."""

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""uname -m -> column of `ALLOWED`, AUDIT_ARCH of the kernel."""

CLONE3 = 435
X32_BIT = 0x40000000
CLONE_THREAD = 0x10000
NEW_NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET of clone(2)."""

TIOCSTI, TIOCLINUX = 0x5412, 0x541C
"""ioctls that type into a terminal."""

AF_UNIX, SOCK_STREAM, SOCK_TYPE_MASK = 1, 1, 0xF

LD, RET, JEQ, JGT, JGE, JSET, AND = 0x20, 0x06, 0x15, 0x25, 0x35, 0x45, 0x54
"""BPF instructions: load a word of the call, return, compare with a constant, mask."""

ALLOW, KILL = 0x7FFF0000, 0x80000000
DENY = 0x00050000 | errno.EPERM
UNKNOWN = 0x00050000 | errno.ENOSYS

NUMBER, ARCHITECTURE, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24
"""Offsets in struct seccomp_data; of the arguments, the low halves on a little-endian machine."""

Instruction = tuple[int, int, int, int]
"""Code, instructions to skip if true, if false, constant."""


def allowed_numbers(machine: str, *, processes: bool) -> dict[str, int]:
    """Name -> number of the calls that pass, on a machine of this kind (`os.uname().machine`)."""
    column = ARCHITECTURES[machine][0]
    numbers: dict[str, int] = {}
    for entry in ALLOWED.split():
        name, *columns = entry.split(":")
        if columns[column] != "-" and (processes or name not in PROCESSES):
            numbers[name] = int(columns[column])
    return numbers


def filter_program(machine: str, *, processes: bool) -> list[Instruction]:
    """The filter for one kind of machine.

    Args:
        machine: ``x86_64`` or ``aarch64``; KeyError for another.
        processes: whether a program may start others and send signals. Threads it may have in any case.
    """
    numbers = allowed_numbers(machine, processes=processes)
    program: list[Instruction] = [
        (LD, 0, 0, ARCHITECTURE),
        (JEQ, 1, 0, ARCHITECTURES[machine][1]),
        (RET, 0, 0, KILL),  # another instruction set, with other numbers
        (LD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        program += [(JGE, 0, 1, X32_BIT), (RET, 0, 0, DENY)]
    # clone3 hides its flags behind a pointer; without it, libraries use clone
    program += [(JEQ, 0, 1, CLONE3), (RET, 0, 0, UNKNOWN)]
    program += _with_arguments(
        numbers.pop("clone"),
        [
            (LD, 0, 0, FIRST_ARGUMENT),
            (JSET, 0, 1, NEW_NAMESPACE_FLAGS),
            (RET, 0, 0, DENY),
            *([] if processes else [(JSET, 1, 0, CLONE_THREAD), (RET, 0, 0, DENY)]),
            (RET, 0, 0, ALLOW),
        ],
    )
    program += _with_arguments(
        numbers.pop("ioctl"),
        [
            (LD, 0, 0, SECOND_ARGUMENT),
            (JEQ, 1, 0, TIOCSTI),
            (JEQ, 0, 1, TIOCLINUX),
            (RET, 0, 0, DENY),
            (RET, 0, 0, ALLOW),
        ],
    )
    program += _with_arguments(  # connected pairs only: asyncio and multiprocessing wake themselves with them
        numbers.pop("socketpair"),
        [
            (LD, 0, 0, FIRST_ARGUMENT),
            (JEQ, 0, 4, AF_UNIX),
            (LD, 0, 0, SECOND_ARGUMENT),
            (AND, 0, 0, SOCK_TYPE_MASK),
            (JEQ, 0, 1, SOCK_STREAM),
            (RET, 0, 0, ALLOW),
            (RET, 0, 0, DENY),
        ],
    )
    for first, last in _ranges(sorted(numbers.values())):
        program += [(JGE, 0, 2, first), (JGT, 1, 0, last), (RET, 0, 0, ALLOW)]
    return [*program, (JGT, 0, 1, NEWEST_KNOWN), (RET, 0, 0, UNKNOWN), (RET, 0, 0, DENY)]


def compile_filter(machine: str, *, processes: bool) -> bytes:
    """`filter_program` as the array of struct sock_filter that the kernel takes."""
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in filter_program(machine, processes=processes))


def _with_arguments(number: int, body: list[Instruction]) -> list[Instruction]:
    """`body` for this call, skipped for the others. It must return in every case: it overwrites the loaded number."""
    return [(JEQ, 0, len(body), number), *body]


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers: [0, 1, 2, 5] -> [(0, 2), (5, 5)]."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges
