"""The command line: text on stdout and nothing else there, one line for every failure, and fast to say what it can."""

import ctypes
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import fp4rt
from fp4rt import driver
from fp4rt.cli import doctor, main
from fp4rt.cli.doctor import Finding
from fp4rt.errors import Fp4rtError
from fp4rt.llm import LLM
from fp4rt.ops.select import make_ops

CHECKPOINT = Path(__file__).parent / "checkpoints" / "llama-modelopt-nvfp4"
REFERENCE = json.loads((CHECKPOINT / "reference" / "reference.json").read_text())
GREEDY = ["--temperature", "0", "--ignore-eos", "--max-tokens", "16"]
ON = ["--device", "reference"]
PROGRAM = [sys.executable, "-c", "from fp4rt.cli import main; main(prog_name='fp4rt')"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(fp4rt.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}


def run(*arguments: str, **options):
    """In this process: exit_code, stdout, stderr."""
    return CliRunner().invoke(main, [str(one) for one in arguments], **options)


def spawn(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen([*PROGRAM, *map(str, arguments)], env=ENVIRONMENT, **options)


def one_error(result) -> str:
    """The only line of stderr that a failure leaves."""
    assert result.exit_code == 1 and result.stdout == ""
    line, = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def expected() -> str:
    from fp4rt.text import Text

    text = Text(CHECKPOINT, json.loads((CHECKPOINT / "config.json").read_text()))
    return text.decode(REFERENCE["greedy_ids"])


# -- The program ----------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy():
    code = ("import sys\nfrom fp4rt.cli import main\n"
            "main(['--help'], prog_name='fp4rt', standalone_mode=False)\n"
            "main(['generate', '--help'], prog_name='fp4rt', standalone_mode=False)\n"
            "heavy = {'numpy', 'numba', 'cupy', 'tokenizers', 'jinja2', 'huggingface_hub'} & set(sys.modules)\n"
            "sys.exit(str(heavy) if heavy else 0)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert (result.returncode, result.stderr) == (0, "")
    for name in ("chat", "doctor", "generate"):
        assert f"\n  {name} " in result.stdout


def test_only_the_chosen_command_is_imported():
    code = ("import sys\nfrom fp4rt.cli import main\nmain(['doctor', '--help'], standalone_mode=False)\n"
            "print([name for name in sys.modules if name.startswith('fp4rt.cli.')], file=sys.stderr)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.stderr.strip() == "['fp4rt.cli.doctor']"


def test_every_module_is_a_command_with_help():
    context = click.Context(main)
    for name in main.list_commands(context):
        assert isinstance(main.get_command(context, name), click.Command)
        result = run(name, "--help")
        assert result.exit_code == 0 and "Usage: " in result.stdout


def test_version():
    assert run("--version").stdout.strip().endswith(fp4rt.__version__)


@pytest.mark.parametrize("arguments", [
    ["nonsense"], ["generate"], ["generate", CHECKPOINT, "x", "--device", "tpu"], ["generate", CHECKPOINT, "x", "y"],
    ["generate", CHECKPOINT, "x", "--temperature", "warm"], ["generate", CHECKPOINT, "x", "--system", "s"],
    ["generate", CHECKPOINT, "x", "--scale-layout", "x"], ["chat"], ["doctor", "x"], ["--nonsense"],
])
def test_wrong_usage_is_exit_code_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Usage: " in result.stderr


@pytest.mark.parametrize("error, line", [
    (fp4rt.Fp4rtError("checkpoint", "a.json: two\nlines"), "error: a.json: two lines"),
    (MemoryError(), "error: not enough memory"),
    (ZeroDivisionError("division by zero"), "error: unexpected ZeroDivisionError: division by zero (fp4rt --traceback"),
])
def test_no_exception_becomes_a_traceback(monkeypatch, error, line):
    def load(*_, **__):
        raise error

    monkeypatch.setattr("fp4rt.llm.load", load)
    assert one_error(run("generate", CHECKPOINT, "x")).startswith(line)
    assert run("--traceback", "generate", CHECKPOINT, "x").exception is error


# -- generate -------------------------------------------------------------------------------------------------------


def test_generate_writes_the_reference_text(expected):
    result = run("generate", CHECKPOINT, REFERENCE["prompt_text"], *GREEDY, *ON)
    assert (result.exit_code, result.stdout) == (0, expected + "\n")
    *report, last = result.stderr.splitlines()
    assert any("NVFP4" in line for line in report)
    prompt_tokens = len(REFERENCE["input_ids"])
    for figure in ("load ", "first token ", f"prefill {prompt_tokens} tokens at ", "decode 16 tokens at "):
        assert figure in last


@pytest.mark.parametrize("arguments", [[], ["-"]])
@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_generate_reads_stdin(arguments, ending, expected):
    result = run("generate", CHECKPOINT, *arguments, *GREEDY, *ON, "--quiet",
                 input=(REFERENCE["prompt_text"] + ending).encode())
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_quiet_and_stop(expected):
    stop = expected[5:8]
    result = run("generate", CHECKPOINT, REFERENCE["prompt_text"], *GREEDY, *ON, "-q", "--stop", stop, "--stop", "\0")
    assert (result.stdout, result.stderr) == (expected[:expected.index(stop)] + "\n", "")


def test_every_option_reaches_the_library(monkeypatch):
    seen = {}

    class Loaded:
        report, load_seconds, text = [], 0.0, None

        def stream(self, prompt, sampling):
            seen.update(prompt=prompt, sampling=sampling)
            return iter(("a", "b"))

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    def load(model, progress, **options):
        seen.update(options, model=model)
        return Loaded()

    monkeypatch.setattr("fp4rt.llm.load", load)
    result = run("generate", "owner/name", "hello", "-q", "--max-tokens", 3, "--temperature", 0.5, "--top-k", 4,
                 "--top-p", 0.25, "--min-p", 0.125, "--repetition-penalty", 1.5, "--presence-penalty", 0.75,
                 "--frequency-penalty", -0.5, "--seed", 9, "--stop", "x", "--stop", "y", "--ignore-eos",
                 "--device", "cuda", "--arch", "sm_75", "--gpu-memory", "14.5GiB", "--max-model-len", 99,
                 "--deterministic", "--kv-dtype", "fp8", "--scale-layout", "swizzled", "--revision", "main",
                 "--lm-head", "fp8", "--requantize", "bf16-layers=nvfp4", "--speculate", 4)
    assert (result.exit_code, result.stdout) == (0, "ab\n")
    assert seen == {
        "model": "owner/name", "prompt": "hello", "device": "cuda", "arch": "sm_75", "gpu_memory": "14.5GiB",
        "max_model_len": 99, "deterministic": True, "kv_dtype": "fp8", "scale_layout": "swizzled", "revision": "main",
        "lm_head": "fp8", "requantize": "bf16-layers=nvfp4", "speculate": 4, "prefix_caching": False,
        "sampling": fp4rt.Sampling(3, 0.5, 4, 0.25, 0.125, 1.5, 0.75, -0.5, 9, ("x", "y"), True)}
    assert run("generate", "owner/name", "hello", "-q").exit_code == 0 and seen["sampling"] == fp4rt.Sampling()


def test_chat_goes_through_the_template(monkeypatch):
    seen = []
    monkeypatch.setattr(LLM, "pieces", lambda self, sequence, _: seen.append((self.text, sequence.ids)) or iter(()))
    assert run("generate", CHECKPOINT, "Hi", "--chat", "--system", "Be kind.", "-q", *ON).exit_code == 0
    text, ids = seen[0]
    assert text.decode(ids, skip_special=False) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize("arguments, words", [
    (["--top-p", "2"], "top_p is 2.0"), (["--temperature", "nan"], "temperature is nan"),
    (["--seed", "-1"], "seed is -1"), (["--stop", ""], "stop is"), (["--max-tokens", "0"], "max_tokens is 0"),
    (["--max-model-len", "0"], "max_model_len"), (["--gpu-memory", "lots"], "gpu_memory"),
    (["--arch", "sm_10"], "arch"),
    (["--revision", "v1"], "revision is 'v1'"),
])
def test_bad_values_are_named(arguments, words):
    assert words in one_error(run("generate", CHECKPOINT, "Hello", "-q", *ON, *arguments))


@pytest.mark.parametrize("data, words", [(b"\xff\xfe", "not UTF-8"), (b"word " * 5000, "the prompt has 5")])
def test_bad_prompts(data, words):
    assert words in one_error(run("generate", CHECKPOINT, "-q", *ON, "--max-tokens", "1", input=data))


def test_models_that_are_none(tmp_path):
    assert "no such directory" in one_error(run("generate", tmp_path / "missing", "x"))
    assert "config.json" in one_error(run("generate", tmp_path, "x"))


def test_pieces_come_as_they_are_made(monkeypatch):
    """The first piece is on stdout before the second is asked for."""
    seen = []

    def stream(self, prompt, sampling):
        for piece in ("one ", "two"):
            yield piece
            seen.append(sys.stdout.buffer.getvalue())

    monkeypatch.setattr(LLM, "stream", stream)
    result = run("generate", CHECKPOINT, "x", "-q", *ON)
    assert result.stdout == "one two\n" and seen == [b"one ", b"one two"]


def test_a_closed_pipe_is_silent():
    child = spawn("generate", CHECKPOINT, "Hello", "-q", *ON, "--ignore-eos", "--max-tokens", "600",
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.read(1)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(60) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("rest", [["Hello"], ["--input-file", "-", "--output-file", "-"],
                                  ["--input-file", "-", "--output-file", "/dev/full"]])
def test_a_full_disk_is_one_line(rest: list[str]):
    with open("/dev/full", "wb") as full:
        child = spawn("generate", CHECKPOINT, *rest, "-q", *ON, "--max-tokens", "3", stdin=subprocess.PIPE, stdout=full,
                      stderr=subprocess.PIPE)
        _, said = child.communicate(b'{"prompt": [1]}\n', 60)
    assert said == b"error: the output cannot be written (No space left on device)\n" and child.returncode == 1


def test_nobody_need_listen_to_stderr():
    child = spawn("generate", CHECKPOINT, "Hello", *ON, "--max-tokens", "3", stdout=subprocess.PIPE,
                  preexec_fn=lambda: os.close(2))
    assert child.communicate(timeout=60)[0] and child.returncode == 0


def test_an_interrupt_where_c_code_calls_back_is_kept(monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    def stream(self, prompt, sampling):
        ctypes.CFUNCTYPE(None)(interrupted)()
        for _ in range(500):
            time.sleep(0.01)
            yield "on and on "

    monkeypatch.setattr(LLM, "stream", stream)
    result = run("generate", CHECKPOINT, "x", "-q", *ON)
    assert result.exit_code == 130 and not result.stderr.strip()


def test_ctrl_c_ends_generate_with_130():
    child = spawn("generate", CHECKPOINT, "Hello", "-q", *ON, "--ignore-eos", "--max-tokens", "1500",
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, 4096)  # less than it writes: it is not done before the signal
    child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert (child.returncode, stderr.strip()) == (130, b"")


def test_output_that_the_locale_cannot_show():
    arguments = ["generate", CHECKPOINT, "Hello", "-q", *ON, "--ignore-eos", "--max-tokens", 64, "--seed", 1]
    child = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True,
                           env={**ENVIRONMENT, "PYTHONIOENCODING": "latin-1"})
    assert child.returncode == 0 and child.stderr == b"" and b"?" in child.stdout


# -- chat -----------------------------------------------------------------------------------------------------------


def chat(*lines: str, arguments=("-q", "--max-tokens", "8", "--temperature", "0", "--ignore-eos")):
    return run("chat", CHECKPOINT, *ON, *arguments, input="\n".join(lines) + "\n")


def test_chat_through_a_pipe_equals_the_library():
    with fp4rt.load(CHECKPOINT, device="reference") as llm:
        session = llm.session(fp4rt.Sampling(temperature=0, max_tokens=8, ignore_eos=True))
        replies = ["".join(session.send(content)) for content in ("Hello", "And then?")]
    result = chat("Hello", "", "And then?")
    assert (result.exit_code, result.stdout) == (0, "".join(reply + "\n" for reply in replies))
    assert result.stderr == ""


def test_chat_commands():
    result = chat("Hello", "/stats", "/clear", "/stats", "/system Be kind.", "Hello", "/nonsense", "/help", "/exit",
                  "never")
    assert result.exit_code == 0 and result.stdout == chat("Hello", "/system Be kind.", "Hello").stdout
    after_turn, after_clear = [line for line in result.stderr.splitlines() if "of context in use" in line]
    assert "decode 8 tokens" in after_turn and "; 0 of" not in after_turn
    assert "; 0 of 2048 tokens" in after_clear
    assert "no command /nonsense" in result.stderr and "/system [TEXT]" in result.stderr


def test_chat_keeps_what_it_computed():
    result = chat("Hello " * 40, "/stats", "Hello again", "/stats")
    first, second = [line for line in result.stderr.splitlines() if "remembered" in line]
    assert ", 0 remembered" in first and ", 0 remembered" not in second


def test_chat_system_message_changes_the_reply_and_clear_restores_it():
    plain = chat("Hello").stdout
    kind = run("chat", CHECKPOINT, *ON, "-q", "--max-tokens", "8", "--temperature", "0", "--ignore-eos", "--system",
               "Be kind.", input="Hello\n").stdout
    assert kind != plain
    assert chat("/system Be kind.", "Hello").stdout == kind
    assert chat("/system Be kind.", "Hello", "/system", "Hello").stdout == kind + plain
    assert chat("Hello", "/clear", "Hello").stdout == plain * 2


def test_chat_without_a_template_says_so_at_once(tmp_path):
    for file in CHECKPOINT.glob("*.*"):
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    assert "has no chat template" in one_error(run("chat", tmp_path, *ON, "-q", input="Hello\n"))


def test_a_turn_that_does_not_fit_ends_a_pipe():
    result = chat("Hello", "word " * 3000, "never")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1 and "tokens" in result.stderr


def test_ctrl_c_stops_the_reply_and_not_the_program():
    """On a terminal: a long reply, an interrupt, and the conversation goes on."""
    control, terminal = pty.openpty()
    child = spawn("chat", CHECKPOINT, *ON, "-q", "--temperature", "0", "--ignore-eos", "--max-tokens", "1500",
                  stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    seen = b""

    def read_until(words: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while words not in seen:
            assert select.select([control], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(control, 4096)

    try:
        read_until(b"> ")
        seen = b""
        os.write(control, b"Hello\n")
        read_until(b"Hello\r\n")
        while len(seen) < 60:  # some of the reply
            seen += os.read(control, 4096)
        seen = b""
        child.send_signal(signal.SIGINT)
        read_until(b"> ")
        seen = b""
        os.write(control, b"/stats\n")
        read_until(b"tokens of context in use")
        assert b"; 0 of" not in seen
        os.write(control, b"/exit\n")
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(control)


# -- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_says_whether_anything_is_usable():
    result = run("doctor", "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == (0 if any(told["usable"].values()) else 1) and result.stderr == ""
    names = {one["name"] for one in told["findings"]}
    assert {"fp4rt", "driver", "gpu", "cupy", "nvrtc", "cache", "cuda backend", "cpu backend"} <= names
    for one in told["findings"]:
        assert one["status"] in ("ok", "problem", "none") and one["found"]
        assert (one["status"] == "problem") == bool(one["cause"]) == bool(one["command"])
    lines = run("doctor").stdout.splitlines()
    assert all(any(name in line for line in lines) for name in names)


def test_doctor_names_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "fp4rt").write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found, = [one for one in doctor.cache([])]
    assert (found.status, found.command) == ("problem", "export XDG_CACHE_HOME=$(mktemp -d)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    found, = [one for one in doctor.cache([])]
    assert found.status == "ok" and not (tmp_path / "new").exists()


class FakeDriver:
    """libcuda as far as doctor looks."""

    def __init__(self, status: int = 0, cuda: int = 13000, capability: tuple[int, int] = (8, 9)):
        self.status, self.cuda, self.capability = status, cuda, capability

    def cuInit(self, _):
        return self.status

    def cuDriverGetVersion(self, out):
        out._obj.value = self.cuda

    def cuDeviceGetCount(self, out):
        out._obj.value = 1

    def cuDeviceGet(self, out, index):
        out._obj.value = index

    def cuDeviceGetName(self, out, size, device):
        out.value = b"NVIDIA Test"

    def cuDeviceTotalMem_v2(self, out, device):
        out._obj.value = 16 << 30

    def cuDeviceGetAttribute(self, out, which, device):
        out._obj.value = self.capability[which - 75]


def findings_with(monkeypatch, library, wheels=None):
    monkeypatch.setattr(doctor, "driver_library", lambda: library)
    monkeypatch.setattr(driver, "driver_library", lambda: library)
    monkeypatch.setattr(doctor, "_start", lambda name, device, remedy: Finding(name, "ok", device))
    if wheels is not None:
        monkeypatch.setattr(doctor, "_version", lambda name: wheels.get(name, "missing"))
        monkeypatch.setattr(driver, "_installed", lambda name: name in wheels)
    return {one.name: one for one in doctor.examine()}


@pytest.mark.parametrize("status, hidden, cause, remedy", [
    (100, None, "sees no GPU", "nvidia-smi -L"), (100, "", "CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES"),
    (803, None, "different releases", "reboot"), (999, None, "error 999", "nvidia-smi"),
])
def test_doctor_explains_a_driver_that_fails(monkeypatch, status, hidden, cause, remedy):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = findings_with(monkeypatch, FakeDriver(status), {})
    assert found["driver"].status == "problem" and cause in found["driver"].cause and remedy in found["driver"].command
    assert found["gpu"].status == "none" and found["cuda backend"].found == "see driver"


@pytest.mark.parametrize("cuda, wheels, cause, remedy", [
    (13000, {}, "needs CuPy", "pip install 'fp4rt[cuda13]'"), (12080, {}, "needs CuPy", "pip install 'fp4rt[cuda12]'"),
    (13000, {"cupy-cuda12x": "14", "cupy-cuda13x": "14"}, "overwrite", "pip uninstall -y cupy-cuda12x cupy-cuda13x"),
])
def test_doctor_explains_a_driver_without_a_usable_cupy(monkeypatch, cuda, wheels, cause, remedy):
    found = findings_with(monkeypatch, FakeDriver(cuda=cuda), wheels)
    assert found["gpu"].status == "ok" and "compute capability 8.9, 16.0 GiB" in found["gpu"].found
    assert found["cupy"].status == "problem" and cause in found["cupy"].cause and remedy in found["cupy"].command
    assert found["cuda backend"].found == "see cupy"


@pytest.mark.parametrize("cuda, wheels, extra", [
    (13000, ["cupy-cuda12x"], "cuda12"), (13000, [], "cuda13"), (12080, ["cupy-cuda13x"], "cuda12"), (0, [], "cuda12"),
    (0, ["cupy-cuda13x"], "cuda13"), (13000, ["cupy-cuda12x", "cupy-cuda13x"], "cuda13")])
def test_the_extra_to_install_is_that_of_the_cupy_that_is_there(monkeypatch, cuda, wheels, extra):
    monkeypatch.setattr(driver, "driver_library", lambda: FakeDriver(cuda=cuda) if cuda else None)
    monkeypatch.setattr(driver, "_installed", lambda name: name in wheels)
    assert driver.cuda_extra() == f"'fp4rt[{extra}]'"


def test_cuda_without_a_driver_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("fp4rt.ops.select.driver_library", lambda: None)
    with pytest.raises(Fp4rtError, match="no NVIDIA driver is installed here .* use device='cpu'"):
        make_ops("cuda", None, None, False)


def test_doctor_names_a_gpu_that_is_too_old(monkeypatch):
    found = findings_with(monkeypatch, FakeDriver(capability=(6, 1)), {})
    assert found["gpu"].status == "problem" and "7.5" in found["gpu"].cause


def test_doctor_never_raises(monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise OSError(f"no {name}")

    monkeypatch.setattr(doctor, "driver_library", Broken)
    result = run("doctor")
    assert isinstance(result.exception, (SystemExit, type(None))) and "could not be examined" in result.stdout
