"""Make rollouts.jsonl: multi-turn rollouts of a scripted agent that really calls tools.

    python make_rollouts.py                 writes rollouts.jsonl beside this file
    python make_rollouts.py -o FILE         writes FILE
    python make_rollouts.py --check         compares what it would write with rollouts.jsonl, exit code 1 if they differ

Nothing in a transcript is written by hand after the fact. Every `<|tool|>` turn is what the tool returned when it
was called: SQLite ran the query, the tests ran the function, `re` matched the pattern, the walker moved in the maze.
What the agent does next is decided by what came back, and the reward is computed from the agent's last answer. The
agent is a program, not a language model: at each turn it draws one of a few ways to go on, and its policy (careful,
explorer, hasty) says how likely each is. Rollouts of one task therefore share a prefix and part at whichever turn
their draws first differ, as samples of a model do.

The standard library alone, no clock, no network, no file but the output. The bytes do not depend on the machine:
integers and fractions instead of floats, and no message of the interpreter is quoted.
"""

from __future__ import annotations

import argparse
import ast
import codecs
import contextlib
import io
import json
import operator
import random
import re
import sqlite3
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

ROLLOUTS_PER_TASK = 8
TOOL_CALL_COST = 0.02
# The odds of a policy for the first, second, ... of the ways to go on, which every script lists from careful to hasty.
POLICIES: dict[str, tuple[float, ...]] = {
    "careful": (8.0, 3.0, 1.0, 1.0),
    "explorer": (1.0, 1.0, 1.0, 1.0),
    "hasty": (1.0, 2.0, 4.0, 4.0),
}

# ---- Episode: one transcript in the making --------------------------------------------------------------------------


class Episode:
    """The transcript of one rollout: draws, tool calls, text, and which bytes of it the agent wrote."""

    def __init__(self, system: str, task: str, policy: str, rng: random.Random) -> None:
        self.text = f"<|system|>\n{system}\n<|user|>\n{task}\n"
        self.loss_spans: list[list[int]] = []
        self.tool_calls = 0
        self._odds = POLICIES[policy]
        self._rng = rng

    def choose(self, *ways: Any) -> Any:
        """One of the ways to go on, listed from careful to hasty."""
        odds = self._odds[: len(ways)]
        mark = self._rng.random() * sum(odds)
        for way, weight in zip(ways, odds, strict=True):
            mark -= weight
            if mark < 0:
                return way
        return ways[-1]

    def call(self, thought: str, name: str, argument: str, tool: Callable[[str], tuple[str, Any]]) -> Any:
        """One agent turn that calls a tool, and the tool's turn. Returns what the tool found."""
        self._agent(f"{thought}\n{name}: {argument}\n")
        shown, found = tool(argument)
        self.tool_calls += 1
        self.text += f"<|tool|>\n{shown}\n"
        return found

    def answer(self, text: str) -> str:
        """The last turn."""
        self._agent(f"ANSWER: {text}\n<|end|>\n")
        return text

    def _agent(self, turn: str) -> None:
        self.text += "<|agent|>\n"
        begin = len(self.text.encode())
        self.text += turn
        self.loss_spans.append([begin, len(self.text.encode())])


# ---- sql: a small shop in SQLite, in memory -------------------------------------------------------------------------

SCHEMA = (
    "CREATE TABLE customers (id INTEGER, name TEXT, city TEXT)",
    "CREATE TABLE orders (id INTEGER, customer INTEGER, month INTEGER, quantity INTEGER, price INTEGER, status TEXT)",
)
NAMES = ("Ada", "Bo", "Cleo", "Dag", "Eve", "Finn", "Gus", "Hana", "Ivo", "June", "Kai", "Lena")
CITIES = ("Oslo", "Lyon", "Cork", "Graz")


def shop() -> tuple[sqlite3.Connection, list[tuple[int, str, str]], list[tuple[int, int, int, int, int, str]]]:
    """The database, and its rows for the reward to be computed without SQL."""
    rng = random.Random(11)
    customers = [(i + 1, name, CITIES[i % len(CITIES)]) for i, name in enumerate(NAMES)]
    orders = []
    for i in range(72):
        status = "cancelled" if rng.random() < 0.25 else "paid"
        customer, month = 1 + int(rng.random() * len(NAMES)), 1 + int(rng.random() * 4)
        orders.append((i + 1, customer, month, 1 + int(rng.random() * 9), 5 * (1 + int(rng.random() * 30)), status))
    db = sqlite3.connect(":memory:")
    for statement in SCHEMA:
        db.execute(statement)
    db.executemany("INSERT INTO customers VALUES (?, ?, ?)", customers)
    db.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?)", orders)
    return db, customers, orders


def sql_tool(db: sqlite3.Connection) -> Callable[[str], tuple[str, Any]]:
    def run(query: str) -> tuple[str, Any]:
        try:
            cursor = db.execute(query)
            rows = cursor.fetchall()
        except sqlite3.OperationalError as error:
            return f"error: {error}", None
        head = " | ".join(column[0] for column in cursor.description)
        return "\n".join([head, *(" | ".join(map(str, row)) for row in rows[:6]), f"({len(rows)} rows)"]), rows

    return run


def best_city(ep: Episode) -> float:
    db, customers, orders = shop()
    tool = sql_tool(db)
    first = ep.choose("schema", "statuses", "query")
    if first == "schema":
        ep.call("I look at the tables before I query them.", "sql", "SELECT name, sql FROM sqlite_master", tool)
    paid = first != "query"
    if first == "statuses" or (first == "schema" and ep.choose(True, False)):
        thought = "Not every order is money: which statuses are there?"
        ep.call(thought, "sql", "SELECT status, count(*) AS n FROM orders GROUP BY status ORDER BY status", tool)
    else:
        paid = ep.choose(True, False)
    money = ep.choose("quantity * price", "price", "amount")
    found = None
    while found is None:
        where = " WHERE status = 'paid'" if paid else ""
        query = (
            f"SELECT city, sum({money}) AS revenue FROM orders JOIN customers ON customers.id = customer{where} "
            "GROUP BY city ORDER BY revenue DESC, city"
        )
        found = ep.call("Revenue per city, largest first.", "sql", query, tool)
        if found is None:
            if ep.choose(True, False):
                thought = "No such column. Which columns are there?"
                ep.call(thought, "sql", "SELECT name FROM pragma_table_info('orders')", tool)
                money = "quantity * price"
            else:
                money = ep.choose("quantity * price", "price")
    city, revenue = found[0]
    if money == "price" and ep.choose(True, False):
        thought = "A price is for one piece; the quantity is missing."
        query = query.replace("sum(price)", "sum(quantity * price)")
        city, revenue = ep.call(thought, "sql", query, tool)[0]
    said = ep.answer(f"{city} {revenue}")
    totals = dict.fromkeys(CITIES, 0)
    for _, customer, _, quantity, price, status in orders:
        if status == "paid":
            totals[customers[customer - 1][2]] += quantity * price
    best = max(totals, key=lambda name: totals[name])
    return 1.0 if said == f"{best} {totals[best]}" else 0.4 * said.startswith(best)


def returning_customers(ep: Episode) -> float:
    db, customers, orders = shop()
    tool = sql_tool(db)
    if ep.choose(True, False):
        ep.call("First a look at the data.", "sql", "SELECT * FROM orders LIMIT 4", tool)
    way = ep.choose("intersect", "join", "or")
    paid = ep.choose(" AND status = 'paid'", "")
    if way == "intersect":
        query = (
            f"SELECT customer FROM orders WHERE month = 1{paid} "
            f"INTERSECT SELECT customer FROM orders WHERE month = 3{paid} ORDER BY customer"
        )
        found = len(ep.call("Buyers of January who are also buyers of March.", "sql", query, tool))
    elif way == "join":
        both = paid and " AND a.status = 'paid' AND b.status = 'paid'"
        distinct = ep.choose("DISTINCT a.customer", "*")
        query = (
            f"SELECT count({distinct}) AS n FROM orders a JOIN orders b ON a.customer = b.customer "
            f"WHERE a.month = 1 AND b.month = 3{both}"
        )
        found = ep.call("I join the orders with themselves.", "sql", query, tool)[0][0]
    else:
        query = f"SELECT count(DISTINCT customer) AS n FROM orders WHERE month IN (1, 3){paid}"
        found = ep.call("I count the customers of both months.", "sql", query, tool)[0][0]
    if found > len(customers) and ep.choose(True, False):
        thought = f"{found} is more than there are customers: the join counts pairs."
        found = ep.call(thought, "sql", query.replace("count(*)", "count(DISTINCT a.customer)"), tool)[0][0]
    elif way == "or" and ep.choose(True, False):
        query = (
            f"SELECT customer FROM orders WHERE month IN (1, 3){paid} GROUP BY customer "
            "HAVING count(DISTINCT month) = 2 ORDER BY customer"
        )
        found = len(ep.call("That is either month. Both months it has to be.", "sql", query, tool))
    said = ep.answer(str(found))
    months = [{o[1] for o in orders if o[2] == month and o[5] == "paid"} for month in (1, 3)]
    truth = len(months[0] & months[1])
    return 1.0 if said == str(truth) else 0.3 if abs(found - truth) <= 1 else 0.0


# ---- calc: exact arithmetic over a parsed expression ----------------------------------------------------------------

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    raise ValueError(f"the calculator knows integers and + - * / only, not {ast.dump(node)}")


def calc_tool(expression: str) -> tuple[str, Fraction]:
    value = evaluate(ast.parse(expression, mode="eval").body)
    return f"{value} (about {int(value * 100) / 100:.2f})", value


def cistern(ep: Episode) -> float:
    truth = Fraction(12) + Fraction(3600 - 45 * 12, 45 + 27 - 18)
    way = ep.choose("steps", "one", "slip")
    rate = ep.choose("45 + 27 - 18", "45 + 27", "45 - 18")
    if way == "steps":
        left = ep.call("What is left after pump A ran alone?", "calc", "3600 - 45 * 12", calc_tool)
        together = ep.call("How fast does it fill from then on?", "calc", rate, calc_tool)
        found = ep.call("Minutes for what is left.", "calc", f"{left} / {together}", calc_tool)
        if ep.choose(True, False):
            found = ep.call("And the 12 minutes before.", "calc", f"12 + {found}", calc_tool)
    else:
        shape = "12 + (3600 - 45 * 12) / ({})" if way == "one" else "12 + 3600 - 45 * 12 / ({})"
        found = ep.call("One expression does it.", "calc", shape.format(rate), calc_tool)
        if way == "slip" and ep.choose(True, False):
            thought = "More than a day cannot be right: brackets are missing."
            found = ep.call(thought, "calc", f"12 + (3600 - 45 * 12) / ({rate})", calc_tool)
    if ep.choose(True, False):
        litres = ep.call("Check: litres at that minute.", "calc", f"45 * 12 + 54 * ({found} - 12)", calc_tool)
        if litres != 3600 and ep.choose(True, False):
            thought = "That is not 3600. Both pumps fill, the drain takes, and the 12 minutes count."
            found = ep.call(thought, "calc", "12 + (3600 - 45 * 12) / (45 + 27 - 18)", calc_tool)
    ep.answer(f"{found} minutes")
    return 1.0 if found == truth else 0.2 if abs(found - truth) <= 12 else 0.0


# ---- test: a function run against unit tests ------------------------------------------------------------------------

CASES: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "empty": ([], []),
    "apart": ([[1, 2], [4, 5]], [[1, 2], [4, 5]]),
    "overlap": ([[1, 4], [3, 6]], [[1, 6]]),
    "touching": ([[1, 3], [3, 5]], [[1, 5]]),
    "unsorted": ([[6, 8], [1, 3], [2, 4]], [[1, 4], [6, 8]]),
    "inside": ([[1, 9], [2, 3]], [[1, 9]]),
}


def merge_source(order: str, compare: str, end: str) -> str:
    return (
        "def merge(spans):\n    out = []\n"
        f"    for lo, hi in {order}:\n        if out and lo {compare} out[-1][1]:\n            out[-1][1] = {end}\n"
        "        else:\n            out.append([lo, hi])\n    return out"
    )


def test_tool(source: str) -> tuple[str, list[str]]:
    """Runs the cases against the function, one of the eight that merge_source writes."""
    scope: dict[str, Any] = {}
    exec(source, scope)
    lines, failed = [], []
    for name, (spans, want) in CASES.items():
        got = scope["merge"]([list(span) for span in spans])
        if got != want:
            failed.append(name)
            lines.append(f"FAIL {name}: merge({spans}) gave {got}, not {want}")
    return "\n".join([*lines, f"{len(CASES) - len(failed)} of {len(CASES)} passed"]), failed


def merge_spans(ep: Episode) -> float:
    parts = {
        "order": ep.choose("sorted(spans)", "spans"),
        "compare": ep.choose("<=", "<"),
        "end": ep.choose("max(out[-1][1], hi)", "hi"),
    }
    repairs = {
        "unsorted": ("order", "sorted(spans)", "The spans come in any order, so I sort them."),
        "touching": ("compare", "<=", "Spans that touch belong together."),
        "inside": ("end", "max(out[-1][1], hi)", "A span inside another must not shorten it."),
    }
    thought, failed = "I write it and run the tests.", ["not run"]
    for _ in range(4):
        failed = ep.call(thought, "test", "\n" + merge_source(**parts), test_tool)
        if not failed or not ep.choose(True, True, False):
            break
        known = [name for name in failed if name in repairs]
        if len(known) > 1 and ep.choose(True, False):
            for name in known:
                parts[repairs[name][0]] = repairs[name][1]
            thought = f"{len(known)} causes: " + " ".join(repairs[name][2] for name in known)
        else:
            part, text, thought = repairs[ep.choose(*known)]
            parts[part] = text
    ep.answer("done" if not failed else f"{len(failed)} still fail")
    return (len(CASES) - len(failed)) / len(CASES)


# ---- match: a regular expression run against examples ---------------------------------------------------------------

TIMES = ("00:00", "09:30", "19:05", "23:59", "20:00")
NOT_TIMES = ("24:00", "12:60", "9:30", "123:456", "29:15", "12:5", "07:777")


def match_tool(pattern: str) -> tuple[str, list[str]]:
    missed = [text for text in TIMES if not re.search(pattern, text)]
    wrong = [text for text in NOT_TIMES if re.search(pattern, text)]
    shown = f"missed: {', '.join(missed) or 'none'}\nwrongly matched: {', '.join(wrong) or 'none'}"
    return shown, missed + wrong


def clock_pattern(ep: Episode) -> float:
    hours = ep.choose("([01][0-9]|2[0-3])", "[0-2][0-9]", "[0-9]+")
    minutes = ep.choose("[0-5][0-9]", "[0-9]{2}", "[0-9]+")
    anchored = ep.choose(True, False)
    thought, errors = "I try a pattern on the examples.", ["not run"]
    for _ in range(4):
        pattern = f"^{hours}:{minutes}$" if anchored else f"{hours}:{minutes}"
        errors = ep.call(thought, "match", pattern, match_tool)
        if not errors or not ep.choose(True, True, False):
            break
        fixes = []
        if not anchored and "123:456" in errors:
            fixes.append("ends")
        if "12:60" in errors or "12:5" in errors:
            fixes.append("minutes")
        if "24:00" in errors or "29:15" in errors or "9:30" in errors:
            fixes.append("hours")
        fix = ep.choose(*fixes)
        if fix == "ends":
            anchored, thought = True, "It matches a part of a longer number: I anchor both ends."
        elif fix == "minutes":
            minutes, thought = "[0-5][0-9]", "Minutes go from 00 to 59."
        elif hours == "[0-9]+":
            hours, thought = ep.choose("([01][0-9]|2[0-3])", "[0-2][0-9]"), "Hours have two digits and an upper end."
        else:
            hours, thought = "([01][0-9]|2[0-3])", "After 2 only 0 to 3 may follow."
    ep.answer(pattern)
    return 1 - len(errors) / (len(TIMES) + len(NOT_TIMES))


# ---- search: text search over the Zen of Python, which every Python carries -----------------------------------------


def zen_lines() -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints the poem when it is imported
        import this

    return codecs.decode(this.s, "rot13").splitlines()


def search_tool(argument: str) -> tuple[str, list[int]]:
    flags, _, word = argument.rpartition(" ")
    pattern = rf"\b{re.escape(word)}\b" if "-w" in flags else re.escape(word)
    found = [
        (number, line)
        for number, line in enumerate(zen_lines(), 1)
        if re.search(pattern, line, re.IGNORECASE if "-i" in flags else 0)
    ]
    shown = [f"{number}: {line}" for number, line in found[:4]]
    more = [f"... and {len(found) - 4} more"] if len(found) > 4 else []
    return "\n".join([*shown, *more, f"{len(found)} lines"]), [number for number, _ in found]


def count_word(ep: Episode) -> float:
    truth = sum(1 for line in zen_lines() if "is" in re.findall(r"[a-z]+", line.lower()))
    flags = ep.choose("-w -i ", "-w ", "-i ", "")
    found = ep.call("I search for the word.", "search", f"{flags}is", search_tool)
    if "-w" not in flags and ep.choose(True, False):
        flags = ep.choose("-w -i ", "-w ")
        found = ep.call(
            "'is' is also a part of 'this' and 'explicit'... whole words only.", "search", f"{flags}is", search_tool
        )
    if "-i" not in flags and ep.choose(True, False):
        flags += "-i "
        found = ep.call("A line could begin with it: I ignore case.", "search", f"{flags}is", search_tool)
    where = ep.call("Now the line with 'Dutch'.", "search", ep.choose("-w Dutch", "Dutch", "dutch"), search_tool)
    if not where and ep.choose(True, False):
        where = ep.call("Names begin with a capital.", "search", "-i dutch", search_tool)
    ep.answer(f"{len(found)} lines, Dutch in line {where[0] if where else 'none'}")
    dutch = next(number for number, line in enumerate(zen_lines(), 1) if "Dutch" in line)
    return 0.5 * (len(found) == truth) + 0.5 * (where == [dutch])


# ---- move: a walk through a maze seen from inside -------------------------------------------------------------------

MAZE = (
    "#########",
    "#S..#...#",
    "#.#.#.#.#",
    "#.#...#.#",
    "#.#####.#",
    "#...#...#",
    "###.#.###",
    "#.....#G#",
    "#.###.#.#",
    "#...#...#",
    "#########",
)
STEPS = {"north": (-1, 0), "east": (0, 1), "south": (1, 0), "west": (0, -1)}


class Walker:
    def __init__(self) -> None:
        self.at = (1, 1)

    def open_ways(self) -> list[str]:
        return [way for way, (dr, dc) in STEPS.items() if MAZE[self.at[0] + dr][self.at[1] + dc] != "#"]

    def move(self, way: str) -> tuple[str, list[str]]:
        """Walks until a wall, a fork or the goal, as the task says."""
        dr, dc = STEPS[way]
        walked = 0
        while MAZE[self.at[0] + dr][self.at[1] + dc] != "#":
            self.at = (self.at[0] + dr, self.at[1] + dc)
            walked += 1
            if len(self.open_ways()) != 2 or MAZE[self.at[0]][self.at[1]] == "G":
                break
        if MAZE[self.at[0]][self.at[1]] == "G":
            return f"walked {walked}. You stand on the goal.", []
        ways = self.open_ways()
        return f"walked {walked}. row {self.at[0]}, column {self.at[1]}. open: {', '.join(ways)}", ways


def maze(ep: Episode) -> float:
    walker, seen, came = Walker(), {(1, 1)}, ""
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}
    ways, turns = walker.open_ways(), 0
    while ways and turns < 12:
        onward = [way for way in ways if way != back.get(came)] or ways
        fresh = []
        for way in onward:
            dr, dc = STEPS[way]
            if (walker.at[0] + dr, walker.at[1] + dc) not in seen:
                fresh.append(way)
        options = fresh or onward
        # The goal is in the south-east: a careful walker prefers what leads there.
        options.sort(key=lambda way: ("south", "east", "west", "north").index(way))
        came = options[0] if len(options) == 1 else ep.choose(*options)
        thought = "The only way on." if len(options) == 1 else f"{len(options)} ways on, I try {came}."
        ways = ep.call(thought, "move", came, walker.move)
        seen.add(walker.at)
        turns += 1
        if turns >= 6 and ways and not ep.choose(True, True, True, False):
            break
    reached = MAZE[walker.at[0]][walker.at[1]] == "G"
    ep.answer("goal" if reached else "lost")
    return 1.0 if reached else 0.0


# ---- The tasks and the file -----------------------------------------------------------------------------------------

RULES = (
    "Work in turns. In every turn write one short thought and then either one tool call or the final answer. A tool "
    "call is the tool's name, a colon and the argument. The final answer begins with ANSWER. Every tool call costs "
    f"{TOOL_CALL_COST:.2f}, a right answer earns 1.00, and a partly right one earns a part of it."
)
DATA_DESK = (
    "You are an analyst with two tools.\nsql: one SQLite query against the shop's database, which has the tables "
    "customers and orders; you see the first six rows.\ncalc: an exact calculator for integers, + - * / and brackets; "
    f"you see the fraction and two decimals.\n{RULES}"
)
CODE_DESK = (
    "You are a programmer with two tools.\ntest: runs a Python function against the task's unit tests and shows every "
    "test that failed with what it gave.\nmatch: runs a regular expression against the task's examples and shows the "
    f"ones it missed and the ones it should not have matched.\n{RULES}"
)
FIELD_DESK = (
    "You are a scout with two tools.\nsearch: finds lines of a text; -w for whole words, -i to ignore case; you see "
    "the first four lines with their numbers.\nmove: walks north, east, south or west until there is a wall, a fork "
    f"or the goal; you see where you stand and which ways are open.\n{RULES}"
)

# name -> (system prompt, task, script)
TASKS: dict[str, tuple[str, str, Callable[[Episode], float]]] = {
    "sql-best-city": (
        DATA_DESK,
        "Which city brought the most revenue, and how much? Revenue is quantity times price of paid orders.",
        best_city,
    ),
    "sql-returning": (
        DATA_DESK,
        "How many customers have a paid order in January and also one in March?",
        returning_customers,
    ),
    "calc-cistern": (
        DATA_DESK,
        (
            "A cistern holds 3600 litres. Pump A brings 45 litres a minute, pump B 27, and the drain takes 18. "
            "Pump A runs alone for 12 minutes; then pump B starts and the drain opens. After how many minutes "
            "in all is it full?"
        ),
        cistern,
    ),
    "code-merge": (
        CODE_DESK,
        (
            "Write merge(spans), which takes a list of [lo, hi] in any order and returns the sorted list in "
            "which spans that overlap or touch are one."
        ),
        merge_spans,
    ),
    "code-clock": (
        CODE_DESK,
        (
            "Give a regular expression for re.search that accepts the times 00:00 to 23:59, written with two "
            "digits each, and nothing else."
        ),
        clock_pattern,
    ),
    "text-zen": (
        FIELD_DESK,
        "The text is the Zen of Python. How many lines hold the word 'is', and which line speaks of a Dutch person?",
        count_word,
    ),
    "maze": (
        FIELD_DESK,
        (
            "You stand in the north-west corner of a maze of rooms (row 1, column 1; east and south are open). "
            "The goal is in row 7, column 7. Go there."
        ),
        maze,
    ),
}


def rollouts() -> list[dict[str, Any]]:
    """ROLLOUTS_PER_TASK different rollouts of every task, in the order they were drawn."""
    records = []
    for task_index, (group, (system, task, script)) in enumerate(TASKS.items()):
        seen: set[str] = set()
        for draw in range(1000):
            policy = list(POLICIES)[draw % len(POLICIES)]
            ep = Episode(system, task, policy, random.Random(1000 * task_index + draw))
            reward = max(0.0, script(ep) - TOOL_CALL_COST * ep.tool_calls)
            if ep.text in seen:
                continue
            seen.add(ep.text)
            records.append(
                {
                    "group": group,
                    "policy": policy,
                    "reward": round(reward, 4),
                    "text": ep.text,
                    "loss_spans": ep.loss_spans,
                }
            )
            if len(seen) == ROLLOUTS_PER_TASK:
                break
        else:
            raise RuntimeError(f"task {group} has only {len(seen)} different rollouts in 1000 draws")
    return records


def as_jsonl() -> bytes:
    """The bytes of rollouts.jsonl."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rollouts()).encode()


def main(argv: Sequence[str] | None = None) -> int:
    here = Path(__file__).resolve().parent / "rollouts.jsonl"
    parser = argparse.ArgumentParser(description="Make the rollouts that ship with tree_attn.")
    parser.add_argument("-o", "--output", type=Path, default=here, help="file to write (default: rollouts.jsonl here)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the file differs")
    args = parser.parse_args(argv)
    made = as_jsonl()
    if args.check:
        same = args.output.read_bytes() == made
        print(f"{args.output}: {'the same, byte for byte' if same else 'differs from what this script makes'}")
        return 0 if same else 1
    args.output.write_bytes(made)
    print(f"wrote {args.output}: {made.count(10)} rollouts of {len(TASKS)} tasks, {len(made)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
