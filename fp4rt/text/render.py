"""The program that renders or examines a checkpoint's chat templates: JSON lines on stdin, a reply to each on stdout.

The first line has no reply: {path: sys.path, templates: {name: text}, cpu_seconds, memory_bytes, max_text}. Those after
it are jobs: {template: name, variables}, or without variables to examine it. The program ends with its stdin. It is run
by its path (see pool.py), so it imports nothing of fp4rt. The Jinja environment is the one that Hugging Face
transformers gives to templates; nothing that a template does there outlives its job.
"""

import datetime
import json
import resource
import signal
import sys
import time


def limit_memory(size):
    """Hold this process to so many bytes of address space, and leave no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ValueError, OSError):  # a lower limit is set already
        pass


def allow_time(seconds):
    """Let this process take so much processor time from now, and up to a second more; SIGXCPU then ends it."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(time.process_time()) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def environment():
    """Jinja as templates expect it: sandboxed, with {% break %}, {% generation %}, tojson and two functions."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks the assistant's words for training; here it is its content."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = raise_exception
    jinja.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return jinja


def problem(kind, message):
    return {"kind": kind, "error": " ".join(message.split())[:500]}


def render(template, variables, max_text):
    """{"text"}: a compiled template over variables."""
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > max_text:
            return problem("checkpoint", f"the chat template writes more than {max_text} characters")
    return {"text": "".join(pieces)}


def examine(parsed):
    """{"looks_at", "strings"}: variables that a template does not set itself, and the strings in its code."""
    from jinja2 import meta, nodes

    return {"looks_at": sorted(meta.find_undeclared_variables(parsed)),
            "strings": sorted({node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)})}


def reply_to(line, opening, jinja, compiled):
    """The line that answers a job's: what `render` or `examine` gives, else {"error", "kind"}."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    def work():
        job = json.loads(line)
        name = job["template"]
        if "variables" not in job:
            return examine(jinja.parse(opening["templates"][name]))
        if name not in compiled:
            compiled[name] = jinja.from_string(opening["templates"][name])
        return render(compiled[name], job["variables"], opening["max_text"])

    try:
        return json.dumps(work())
    except TemplateSyntaxError as error:
        failed = problem("checkpoint", f"line {error.lineno} of the chat template is not valid: {error.message}")
    except SecurityError as error:
        failed = problem("checkpoint", f"the chat template does something forbidden: {error}")
    except MemoryError:
        size = f"{opening['memory_bytes'] >> 20} MiB"
        failed = problem("checkpoint", f"the chat template needs more than {size} of memory")
    except RecursionError:
        failed = problem("checkpoint", "the chat template calls itself without end")
    except TemplateError as error:
        failed = problem("request", f"the chat template refuses these messages: {error}")
    except Exception as error:
        failed = problem("request", f"the chat template fails on these messages: {type(error).__name__}: {error}")
    return json.dumps(failed)


def main():
    signal.pthread_sigmask(signal.SIG_SETMASK, ())    # whatever the thread that started this process has blocked
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)     # or ignored
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # a terminal's Ctrl-C is for the program that asks
    lines, replies = sys.stdin.buffer, sys.stdout
    opening = json.loads(lines.readline())
    limit_memory(opening["memory_bytes"])
    sys.path[:] = opening["path"]
    jinja, compiled = environment(), {}
    while line := lines.readline():
        allow_time(opening["cpu_seconds"])
        replies.write(reply_to(line, opening, jinja, compiled) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
