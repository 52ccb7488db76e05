"""A judging model behind any OpenAI-compatible address; every reply is kept in the run folder."""

import hashlib
import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from eval.responses import trim
from mm.common.errors import UserError
from mm.common.files import read_jsonl

RETRY_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}


class Judge:
    """`Judge(url="http://host:8000/v1", model="...").ask(prompt)`.

    Args:
        url: base address; `/chat/completions` is added unless it is there already.
        cache: a JSONL file of replies by (model, prompt): a question is paid for once.
        timeout: seconds per call; retries: further tries after a timeout, a lost line or a busy server.
    """

    def __init__(
        self, *, url: str, model: str, api_key: str | None = None, cache: str | Path | None = None,
        timeout: float = 60.0, retries: int = 3, pause: float = 1.0,
    ):  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise UserError(
                f"judge address {url!r} must begin with http:// or https://, e.g. http://localhost:8000/v1"
            )
        base = url.rstrip("/")
        self.url = base if base.endswith("/chat/completions") else base + "/chat/completions"
        self.model, self.api_key, self.timeout, self.retries, self.pause = model, api_key, timeout, retries, pause
        self.cache: Path | None = None
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if cache:
            self.cache_in(cache)

    def cache_in(self, path: str | Path) -> None:
        """Keep replies in this file from now on, and know those it holds."""
        self.cache = Path(path)
        if self.cache.exists():
            trim(self.cache)
            self._known = {row["key"]: row["reply"] for row in read_jsonl(self.cache)}

    def ask(self, prompt: str) -> str | None:
        """The judge's reply (temperature 0), or None when it stays out of reach (see `failures`).

        Raises UserError where the server refuses the request for good (wrong key, unknown model).
        """
        k = hashlib.sha256(f"{self.model}\0{prompt}".encode()).hexdigest()[:32]
        if k in self._known:
            return self._known[k]
        reply = self._call(prompt)
        if reply is not None:
            with self._lock:
                self._known[k] = reply
                self._save({"key": k, "model": self.model, "prompt": prompt, "reply": reply})
        return reply

    def _save(self, row: dict) -> None:
        if self.cache:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with open(self.cache, "a", encoding="utf-8") as f:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _call(self, prompt: str) -> str | None:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as e:
                problem = f"HTTP {e.code}"
                if e.code not in RETRY_STATUS:
                    detail = e.read(300).decode("utf-8", "replace")
                    raise UserError(f"judge {self.url} refuses model {self.model!r}: HTTP {e.code} {detail}") from e
            except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
                problem = type(e).__name__
        with self._lock:
            self.failures.append(problem)
        return None


def yes_or_no(reply: str) -> float | None:
    """A verdict that begins or ends with yes/no as a whole word; None for anything else."""
    words = "".join(c if c.isalpha() else " " for c in reply.casefold()).split()
    for word in (words[0], words[-1]) if words else ():
        if word in ("yes", "no"):
            return float(word == "yes")
    return None
