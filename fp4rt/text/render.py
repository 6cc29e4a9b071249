"""The program that renders or examines one chat template: a job as JSON on stdin, a reply as JSON on stdout.

It is run by its path (see template.py), so it imports nothing of fp4rt. The Jinja environment is the one that Hugging
Face transformers gives to templates.
"""

import datetime
import json
import sys


def limit(cpu_seconds, memory_bytes):
    """Hold this process to its limits, where the operating system has them."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for which, soft, hard in ((resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),  # SIGXCPU, which says why
                              (resource.RLIMIT_AS, memory_bytes, memory_bytes)):
        try:
            resource.setrlimit(which, (soft, hard))
        except (ValueError, OSError):  # a lower limit is set already
            pass


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


def render(job):
    """{"text"}: the template over the job's variables."""
    pieces, size = [], 0
    for piece in environment().from_string(job["template"]).generate(job["variables"]):
        pieces.append(piece)
        size += len(piece)
        if size > job["max_text"]:
            return problem("checkpoint", f"the chat template writes more than {job['max_text']} characters")
    return {"text": "".join(pieces)}


def examine(job):
    """{"looks_at", "strings"}: variables that the template does not set itself, and the strings in its code."""
    from jinja2 import meta, nodes

    parsed = environment().parse(job["template"])
    return {"looks_at": sorted(meta.find_undeclared_variables(parsed)),
            "strings": sorted({node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)})}


def reply_to(job):
    """What `render` (a job with variables) or `examine` gives, else {"error", "kind"}."""
    sys.path[:] = job["path"]
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    try:
        return render(job) if "variables" in job else examine(job)
    except TemplateSyntaxError as error:
        return problem("checkpoint", f"line {error.lineno} of the chat template is not valid: {error.message}")
    except SecurityError as error:
        return problem("checkpoint", f"the chat template does something forbidden: {error}")
    except MemoryError:
        return problem("checkpoint", f"the chat template needs more than {job['memory_bytes'] >> 20} MiB of memory")
    except RecursionError:
        return problem("checkpoint", "the chat template calls itself without end")
    except TemplateError as error:
        return problem("request", f"the chat template refuses these messages: {error}")
    except Exception as error:
        return problem("request", f"the chat template fails on these messages: {type(error).__name__}: {error}")


if __name__ == "__main__":
    job = json.load(sys.stdin.buffer)
    limit(job["cpu_seconds"], job["memory_bytes"])
    reply = reply_to(job)
    json.dump(reply, sys.stdout)
