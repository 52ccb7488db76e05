"""Official TSV columns drop in; judged and unjudged answers; bad rows named. The judge is a real HTTP server."""

import csv
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from eval import kc_mmbench
from eval.judge import Judge, yes_or_no
from eval.runner import Options, run
from mm.common.errors import UserError
from tests.eval.eval_answerers import ColourReader, picture

ROWS = {
    "CPV": [("1", "Attributes as JSON?", '{"颜色": "红色", "size": "M"}', "a.png")],
    "Video_Topic": [("1", "Same event?", "是_否_是", "['a.png', 'b.png', 'c.png']")],
    "Video_Order": [("1", "Order?", "[Video 3, Video 1, Video 2]", '["a.png", "b.png"]')],
    "PornComment": [("1", "评论？", "否", "a.png"), ("2", "Is it?" + kc_mmbench.SUFFIX, "yes", "images/b.png")],
    "High_like": [("1", "Over?", "是", "a.png")],
    "SPU": [("1", "Same product?", "no", "['a.png', 'b.png']")],
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for i, name in enumerate("abc"):
        picture(tmp_path / "kc" / "images" / f"{name}.png", i, i)
    for name, rows in ROWS.items():
        write(tmp_path / "kc", name, rows)
    return tmp_path / "kc"


def write(root: Path, name: str, rows: list, columns=kc_mmbench.COLUMNS) -> None:
    (root / "subsets").mkdir(parents=True, exist_ok=True)
    with open(root / "subsets" / f"{name}.tsv", "w", encoding="utf-8", newline="") as f:
        csv.writer(f, delimiter="\t").writerows([columns, *rows])


def test_official_columns_drop_in(folder):
    tasks = {t.name: t for t in kc_mmbench.load_tasks(folder)}
    assert list(tasks) == ["CPV", "Hot_Videos_Aggregation", "Collection_Order", "Pornographic_Comment",
                           "High_like", "SPU"]  # fmt: skip
    content = tasks["Hot_Videos_Aggregation"].items[0].messages[0]["content"]
    assert [p["type"] for p in content] == ["image"] * 3 + ["text"]
    assert [p.get("image") for p in content[:3]] == ["images/a.png", "images/b.png", "images/c.png"]
    text = [i.messages[0]["content"][-1]["text"] for i in tasks["Pornographic_Comment"].items]
    assert [t.count("请直接给出结论") for t in text] == [1, 1]  # added once, never twice
    assert "请直接给出结论" not in tasks["CPV"].items[0].messages[0]["content"][-1]["text"]
    assert tasks["Pornographic_Comment"].items[1].media == ["images/b.png"]
    assert all(i.split == "test" for t in tasks.values() for i in t.items)
    chances = {n: t.chance(t.items[0], []) for n, t in tasks.items()}
    assert chances == {"CPV": 0.0, "Hot_Videos_Aggregation": 0.125, "Collection_Order": pytest.approx(1 / 6),
                       "Pornographic_Comment": 0.5, "High_like": 0.5, "SPU": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    "task, response, score",
    [
        ("CPV", '```json\n{"size": "m", "颜色": "红色"}\n```', 1.0), ("CPV", '{"颜色": "红色"}', 0.0),
        ("CPV", "red", 0.0),
        ("Hot_Videos_Aggregation", "[是, 否, 是]", 1.0), ("Hot_Videos_Aggregation", "是_否_是", 1.0),
        ("Hot_Videos_Aggregation", "[yes, no, yes]", 1.0), ("Hot_Videos_Aggregation", "[是, 否]", 0.0),
        ("Collection_Order", "<think>[1]</think>[Video 3, Video 1, Video 2]", 1.0),
        ("Collection_Order", "[3,2,1]", 0.0),
        ("Pornographic_Comment", "否。", 1.0), ("Pornographic_Comment", "<answer>no</answer>", 1.0),
        ("Pornographic_Comment", "否认", 0.0), ("SPU", "No", 1.0), ("SPU", "是", 0.0), ("SPU", "", 0.0),
    ],
)  # fmt: skip
def test_rules(folder, task, response, score):
    found = next(t for t in kc_mmbench.load_tasks(folder) if t.name == task)
    assert found.check(found.items[0], response)[1] == score


def test_split_words_and_ceilings(folder):
    rows = [
        ("1", "q", "yes", "a.png", "seen/zh"),
        ("2", "q", "no", "a.png", "train en"),
        ("3", "q", "no", "a.png", "x"),
    ]
    write(folder, "SPU", rows, (*kc_mmbench.COLUMNS, "category"))
    (folder / "ceilings.json").write_text(json.dumps({"SPU": 0.95, "High_like": 0.8, "unseen": {"SPU": 0.9}}))
    tasks = {t.name: t for t in kc_mmbench.load_tasks(folder, splits=("seen",))}
    assert [i.id for i in tasks["SPU"].items] == ["1"] and [i.id for i in tasks["SPU"].train] == ["2"]
    assert tasks["SPU"].ceiling("seen") == 0.95 and tasks["SPU"].ceiling("unseen") == 0.9
    assert tasks["CPV"].ceiling("seen") == 1.0
    assert tasks["High_like"].ceiling("seen") == 0.8


def test_bad_rows_are_named_and_the_rest_is_scored(folder):
    rows = [("1", "q", "否", "a.png"), ("1", "q", "否", "a.png"), ("2", "q", "", "a.png"), ("3", "q", "否", "[oops"),
            ("4", "q", "否", "gone.png"), ("5", "q")]  # fmt: skip
    write(folder, "SPU", rows)
    tasks = [t for t in kc_mmbench.load_tasks(folder) if t.name == "SPU"]
    result = run(ColourReader(), tasks, folder / "out", {}, Options(quiet=True))
    assert result["tasks"]["SPU"]["n"] == 1
    assert result["run"]["skipped"] == {
        "index was there before": 1, "answer is empty": 1, "image_path is not a path or a list of paths": 1,
        "row has too few columns": 1, "not an image": 1,
    }  # fmt: skip
    assert "SPU/SPU.tsv row 3 (index 1): index was there before" in result["run"]["skipped_items"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"index\tquestion\tanswer\n1\tq\ta\n", "lacks the columns image_path; it has index, question, answer"),
        (b"", "lacks the columns"),
        (b"index\tquestion\tanswer\timage_path\n", "holds no rows"),
        ("index\tquestion\tanswer\timage_path\n1\t问\t是\ta".encode("gbk"), "not a UTF-8 TSV"),
    ],
)
def test_files_that_are_not_of_the_format(folder, content, message):
    (folder / "subsets" / "SPU.tsv").write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        kc_mmbench.load_tasks(folder)
    assert "SPU.tsv" in str(e.value)


def test_a_folder_without_subsets(tmp_path):
    with pytest.raises(UserError, match=r"CPV\.tsv"):
        kc_mmbench.load_tasks(tmp_path)


# ---- judge


class Handler(BaseHTTPRequestHandler):
    """Speaks the protocol: fails first, then says that the response is right when it holds the word `red`."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Server = self.server  # type: ignore[assignment]
        server.seen.append((self.path, self.headers.get("Authorization"), body))
        if server.failures:
            server.failures -= 1
            return self._send(server.status, {"error": "busy"})
        response = body["messages"][0]["content"].split("[Response]")[1]
        reply = server.reply or ("yes" if "red" in response else "no")
        self._send(200, {"choices": [{"message": {"role": "assistant", "content": reply}}]})

    def _send(self, status: int, value: dict) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: object) -> None: ...


class Server(HTTPServer):
    failures, status, reply = 0, 503, ""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


@pytest.fixture
def server():
    found = Server()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    thread.join()


def test_judge_speaks_openai_retries_and_remembers(server, tmp_path):
    server.failures = 2
    judge = Judge(url=server.url, model="m", api_key="k", cache=tmp_path / "judge.jsonl", pause=0.01)
    prompt = "[Question] a [Response] red"
    assert judge.ask(prompt) == "yes" and len(server.seen) == 3
    path, key, body = server.seen[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer k", "m", 0)
    again = Judge(url=server.url + "/chat/completions", model="m", cache=tmp_path / "judge.jsonl")
    assert again.ask(prompt) == "yes" and len(server.seen) == 3
    server.failures, server.status = 9, 500
    assert Judge(url=server.url, model="m", retries=1, pause=0.01).ask(prompt) is None
    server.status = 401
    with pytest.raises(UserError, match="HTTP 401"):
        judge.ask(prompt + "!")
    with pytest.raises(UserError, match="http://"):
        Judge(url="localhost", model="m")
    assert [yes_or_no(r) for r in ("Yes.", "so: no", "unclear", "")] == [1.0, 0.0, None, None]


def test_a_judge_decides_what_rules_cannot_and_scores_say_so(server, folder):
    tasks = kc_mmbench.load_tasks(folder)
    alone = run(ColourReader(), tasks, folder / "out", {}, Options(quiet=True))
    assert alone["tasks"]["CPV"]["value"] == 0.0 and alone["run"]["verdicts"] == {"rule": 7}
    assert "1 of CPV" in alone["run"]["notes"][0]
    judge = Judge(url=server.url, model="judge-1", cache=folder / "out" / "judge.jsonl")
    judged = run(ColourReader(), tasks, folder / "out", {}, Options(quiet=True, judge=judge))
    assert judged["tasks"]["CPV"]["value"] == 1.0  # "It is red." says what the reference says, the judge finds
    assert judged["run"]["verdicts"]["judge-1"] == 7 and not any("judge" in n for n in judged["run"]["notes"])
    asked = len(server.seen)
    run(ColourReader(), tasks, folder / "out", {}, Options(quiet=True, judge=judge))
    assert len(server.seen) == asked


def test_a_judge_out_of_reach_leaves_the_rule(server, folder):
    server.failures = 1000
    judge = Judge(url=server.url, model="judge-1", retries=0)
    tasks = [t for t in kc_mmbench.load_tasks(folder) if t.name == "CPV"]
    result = run(ColourReader(), tasks, folder / "out", {}, Options(quiet=True, judge=judge))
    assert result["run"]["verdicts"] == {"rule": 1} and "no judge decided" in result["run"]["notes"][0]
