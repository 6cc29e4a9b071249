"""The processes that render chat templates: kept, replaced when they hang, swell or die, gone with their owner."""

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fp4rt
from fp4rt.errors import Fp4rtError
from fp4rt.text import pool, template
from fp4rt.text.template import ChatTemplate

SOURCE = """
{%- set n = namespace(text=messages[0].content) -%}
{%- if n.text == 'hang' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif n.text == 'swell' %}{% for i in range(99) %}{% set n.text = n.text ~ n.text %}{% endfor %}
{%- elif n.text == 'work' %}{% for i in range(99999) %}{% endfor %}
{%- elif n.text == 'refuse' %}{{ raise_exception('no') }}{% endif -%}
<{{ n.text }}>"""


def ask(chat: ChatTemplate, content: str) -> str:
    return chat.render({"messages": [{"role": "user", "content": content}]})


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one whose new parent has not yet waited for it has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def started(monkeypatch) -> list[int]:
    """The ids of the processes that were started."""
    pids = []
    start = pool._Process.__init__

    def note(self, opening):
        start(self, opening)
        pids.append(self._child.pid)

    monkeypatch.setattr(pool._Process, "__init__", note)
    return pids


@pytest.fixture
def make(monkeypatch, started):
    """Makes a ChatTemplate of SOURCE under other limits; closes it at the end, when nothing of it may be left."""
    made = []

    def make(**limits) -> ChatTemplate:
        for name, value in {"CPU_SECONDS": 1, "MEMORY_BYTES": 256 << 20, **limits}.items():
            monkeypatch.setattr(template, name, value)
        made.append(ChatTemplate("x.jinja", {"default": SOURCE}))
        return made[-1]

    yield make
    for chat in made:
        chat.close()
    assert all(is_gone(pid) for pid in started)


def test_one_process_renders_a_hundred_times(make, started):
    chat = make()
    assert not started
    assert [ask(chat, str(i)) for i in range(100)] == [f"<{i}>" for i in range(100)]
    assert chat.interest().variables == {"messages"}
    for _ in range(3):
        with pytest.raises(Fp4rtError, match="refuses these messages: no"):
            ask(chat, "refuse")
    assert ask(chat, "on") == "<on>" and len(started) == 1


def test_a_render_leaves_nothing_to_the_next(make, started):
    source = "{{ x is defined }} {{ y }} {% set x = 1 %}{% macro m() %}{% endmacro %}{{ x }} {{ m is defined }}"
    chat = ChatTemplate("x", {"default": source})
    assert [chat.render({"y": 2}), chat.render({})] == ["False 2 1 True", "False  1 True"] and len(started) == 1
    chat.close()


def test_threads_share_a_few_processes(make, started):
    chat = make()
    with ThreadPoolExecutor(3 * pool.MAX_PROCESSES) as threads:
        replies = list(threads.map(lambda i: ask(chat, f"{i} " * i), range(300)))
    assert replies == [f"<{f'{i} ' * i}>" for i in range(300)]
    assert 1 <= len(started) <= pool.MAX_PROCESSES


def test_one_that_hangs_does_not_hold_up_another(make, started):
    chat = make()
    with ThreadPoolExecutor(1) as threads:
        hangs = threads.submit(ask, chat, "hang")
        wait_until(lambda: started)
        assert ask(chat, "hi") == "<hi>" and not hangs.done()
        assert "more than 1 s of processor time" in str(hangs.exception())
    assert ask(chat, "again") == "<again>" and len(started) == 2


@pytest.mark.parametrize("content, words", [("hang", "more than 1 s of processor time"), ("swell", "MiB of memory")])
@pytest.mark.parametrize("before", [0, 1])
def test_what_exceeds_its_limits_costs_one_process(make, started, content, words, before):
    chat = make()
    for _ in range(before):
        assert ask(chat, "hi") == "<hi>"
    with pytest.raises(Fp4rtError, match=words) as caught:
        ask(chat, content)
    assert caught.value.kind == "checkpoint" and len(started) == 1 and is_gone(started[0])
    assert ask(chat, "hi") == "<hi>" and len(started) == 2


def test_processor_time_is_counted_for_each_render(make, started):
    chat = make()
    ask(chat, "hi")
    tick = os.sysconf("SC_CLK_TCK")

    def used() -> float:
        return sum(map(int, Path(f"/proc/{started[0]}/stat").read_text().rpartition(")")[2].split()[11:13])) / tick

    while used() < 2.2:  # past what the first render was allowed: at most 2 s
        assert ask(chat, "work") == "<work>"
    assert len(started) == 1
    with pytest.raises(Fp4rtError, match="processor time"):
        ask(chat, "hang")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_killed_while_it_waits_is_replaced(make, started, number):
    chat = make()
    ask(chat, "hi")
    os.kill(started[0], number)
    wait_until(lambda: is_gone(started[0]))
    assert ask(chat, "x" * 10**6) == f"<{'x' * 10**6}>" and len(started) == 2


def test_one_killed_at_its_first_render_is_told(make, started):
    chat = make(CPU_SECONDS=60)
    with ThreadPoolExecutor(1) as threads:
        hangs = threads.submit(ask, chat, "hang")
        wait_until(lambda: started)
        os.kill(started[0], signal.SIGKILL)
        assert "its process ended with -9" in str(hangs.exception())
    assert ask(chat, "hi") == "<hi>"


def test_one_that_is_stopped_is_late(make, started):
    chat = make(WALL_SECONDS=1)
    ask(chat, "hi")
    os.kill(started[0], signal.SIGSTOP)
    with pytest.raises(Fp4rtError, match="did not finish within 1 s"):
        ask(chat, "x" * 10**7)  # more than the socket takes before it is read
    assert is_gone(started[0])
    assert ask(chat, "hi") == "<hi>" and len(started) == 2


def test_ctrl_c_is_not_for_them(make, started):
    chat = make()
    ask(chat, "hi")
    os.kill(started[0], signal.SIGINT)
    assert ask(chat, "hi") == "<hi>" and len(started) == 1


def test_a_blocked_or_ignored_signal_is_not_inherited(make, started):
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXCPU})
    ignored = signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    try:
        with pytest.raises(Fp4rtError, match="processor time"):
            ask(make(), "hang")
    finally:
        signal.signal(signal.SIGXCPU, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def test_close_leaves_neither_processes_nor_descriptors(make, started):
    gc.collect()
    before = os.listdir("/proc/self/fd")
    chat = make()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: ask(chat, "work"), range(8)))
    for content in ("hang", "swell"):
        with pytest.raises(Fp4rtError):
            ask(chat, content)
    chat.close()
    chat.close()
    assert os.listdir("/proc/self/fd") == before
    for pid in started:
        with pytest.raises(ChildProcessError):  # waited for already
            os.waitpid(pid, os.WNOHANG)
    with pytest.raises(Fp4rtError, match="closed"):
        ask(chat, "hi")
    assert os.listdir("/proc/self/fd") == before


def test_close_ends_a_render_on_its_way(make, started):
    chat = make(CPU_SECONDS=60)
    ask(chat, "hi")
    with ThreadPoolExecutor(1) as threads:
        hangs = threads.submit(ask, chat, "hang")
        wait_until(lambda: not chat._pool._idle)
        chat.close()
        assert is_gone(started[0]) and "closed" in str(hangs.exception())
    assert len(started) == 1


def test_one_dropped_without_close_ends_too(started):
    chat = ChatTemplate("x", {"default": SOURCE})
    ask(chat, "hi")
    del chat
    gc.collect()
    assert is_gone(started[0])


def test_an_llm_closes_them(started):
    with fp4rt.load("demo", device="reference") as llm:
        llm.text.render_chat([{"role": "user", "content": "Hi"}])
        assert not is_gone(started[0])
    assert is_gone(started[0])


OWNER = """
import os, signal, sys
from fp4rt.text.template import ChatTemplate
chat = ChatTemplate("x", {"default": "{{ pid }}"})
render = lambda: chat.render({"pid": os.getpid()}) == str(os.getpid())
assert render()
(process,) = chat._pool._processes
ours = process._child.pid
"""


def test_they_end_with_an_owner_that_is_killed_even_where_its_fork_lives_on():
    code = OWNER + """
fork = os.fork() or sys.stdin.read() and os._exit(0)
print(ours, fork, flush=True)
signal.pause()
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ours, fork = map(int, owner.stdout.readline().split())
    owner.kill()
    owner.wait()
    wait_until(lambda: is_gone(ours))
    assert not is_gone(fork)
    owner.communicate("end")  # which the fork reads
    wait_until(lambda: is_gone(fork))


def test_an_owner_that_sigpipe_ends_outlives_them():
    code = OWNER + """
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.kill(ours, signal.SIGKILL)
os.waitid(os.P_PID, ours, os.WEXITED | os.WNOWAIT)
assert render()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_fork_starts_its_own_and_leaves_the_others_alone():
    code = OWNER + """
fork = os.fork()
if not fork:
    right = render() and process not in chat._pool._processes
    chat.close()
    sys.exit(0 if right else 3)  # with what is to be done at exit
assert os.waitpid(fork, 0)[1] == 0
assert render() and chat._pool._processes == {process}
print(ours)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert is_gone(int(done.stdout))
