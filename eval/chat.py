"""Talk with a checkpoint about pictures and clips, in a terminal or in one call.

In the terminal a line is a question; `/image PATH` and `/video PATH` go before the next question, `/reset`
begins anew, `/quit` (or Ctrl-D) ends.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from eval.answer import Checkpoint
from mm.common.errors import BadSample, UserError
from mm.generate import generate

HELP = "/image PATH   /video PATH   /reset   /quit"
Medium = tuple[str, str]  # ("image" or "video", path)


class Conversation:
    """Turns so far, media included; `ask` answers and remembers.

    Args: temperature 0 takes the likeliest token; `seed` moves on by one each turn.
    """

    def __init__(
        self, model: Checkpoint, *, max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
        seed: int = 0,
    ):  # fmt: skip
        self.model, self.max_new_tokens = model, max_new_tokens
        self.temperature, self.top_p, self.seed = temperature, top_p, seed
        self.messages: list[dict] = []
        self.waiting: list[dict] = []

    def add(self, kind: str, path: str) -> str:
        """Show a picture or clip with the next question; says what the model will see.

        Raises UserError where the file cannot be read.
        """
        part = {"type": kind, kind: str(Path(path).expanduser().absolute())}
        try:
            frames, plan = self.model.media.load(Path("/"), part)
        except BadSample as e:
            raise UserError(f"{path} is no {kind} that can be read: {e.reason}") from e
        self.waiting.append(part)
        height, width = frames.shape[1:3]
        if plan is None:
            return f"{width}x{height} px"
        times = [float(t) for t in plan.times]
        return f"{len(frames)} frames of {width}x{height} px, {times[0]:.1f} s to {times[-1]:.1f} s"

    def ask(self, question: str) -> str:
        content: Any = [*self.waiting, {"type": "text", "text": question}] if self.waiting else question
        messages = [*self.messages, {"role": "user", "content": content}]
        example = self.model.example(messages, Path("/"))
        answer = generate(
            self.model.model, [example], self.model.tokenizer, max_new_tokens=self.max_new_tokens,
            temperature=self.temperature, top_p=self.top_p, seed=self.seed,
        )[0]  # fmt: skip
        self.seed += 1
        self.messages, self.waiting = [*messages, {"role": "assistant", "content": answer}], []
        return answer

    def reset(self) -> None:
        self.messages, self.waiting = [], []


def chat(
    checkpoint: str | Path, media: Iterable[Medium] = (), question: str | None = None, *, max_new_tokens: int = 256,
    temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, device: str = "cpu",
    lines: Iterable[str] | None = None, out: TextIO | None = None,
) -> str:  # fmt: skip
    """One answer where there is a `question`, else a talk until /quit; returns the last answer.

    Args:
        media: ("image" or "video", path) shown with the first question.
        lines: what a person would type, for scripts and tests; the terminal by default.
    Raises: UserError for a checkpoint or a medium that cannot be read.
    """
    out = out if out is not None else sys.stdout
    talk = Conversation(
        Checkpoint(checkpoint, device=device), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        seed=seed,
    )  # fmt: skip
    for kind, path in media:
        seen = talk.add(kind, path)
        if question is None:
            print(f"{kind}: {seen}", file=out)
    if question is not None:
        answer = talk.ask(question)
        print(answer, file=out, flush=True)
        return answer
    print(HELP, file=out, flush=True)
    return _loop(talk, _typed() if lines is None else lines, out)


def _loop(talk: Conversation, lines: Iterable[str], out: TextIO) -> str:
    answer = ""
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            break
        try:
            reply = _command(talk, command, rest.strip()) if command.startswith("/") else None
            if reply is None and line.strip():
                answer = reply = talk.ask(line.strip())
        except UserError as e:
            reply = str(e)
        if reply is not None:
            print(reply, file=out, flush=True)
    return answer


def _command(talk: Conversation, command: str, rest: str) -> str:
    if command in ("/image", "/video"):
        return talk.add(command[1:], rest.strip("'\"")) if rest else f"{command} needs a path"
    if command == "/reset":
        talk.reset()
        return "begun anew"
    return f"{command} is not known. {HELP}"


def _typed() -> Iterable[str]:
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def media_of(images: Sequence[str], videos: Sequence[str]) -> list[Medium]:
    """What `--image` and `--video` gave, pictures first, as `chat` takes it."""
    return [*(("image", p) for p in images), *(("video", p) for p in videos)]
