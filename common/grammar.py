"""
A probabilistic grammar: it generates texts, recognises them, and knows the exact probability of
each. What can be said stands in the templates that `Grammar` is given; nothing here knows of them.

A derivation is a walk through the templates: at every choice one option is taken, and the text that
follows always tells which. So text and derivation belong together one to one, the probability of
the derivation is the probability of the text, and its mean logarithm is a floor under the loss of
any model of these texts.

The language of the templates:

  {hero:people}   draw one of the list, not taken by another role, and say it: a first mention
  {hero}          say it again: a fact.  {hero.he} {hero.His} {food.s}: in another form
  {a colour:..}   with a or an before it;  {at place:..} with its preposition: "in the orchard"
  {k:part n}      draw a number from 2 to n - 2;  {n-k} and {n+k} say the result
  [this|that]     take one of these;  [3*this|that] takes the first three times out of four
  <joy>           one of the phrases called joy
  <<who>>         the same, told by somebody in the text: the people and things in it are others,
                  though they may be called the same
  {~hero}         say it again, where nothing before tells who will be asked for: no fact
  =>              in a phrase, between two speakers
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

TOKEN = re.compile(r"([\[\]|]|\{[^}]*\}|<<?\w+>>?)")
FACTS = ("", "s", "Cap")  # forms that say a fact; the others are inflection
PRONOUNS = {"girls": "girl she her her", "boys": "boy he him his"}  # of the lists so called


class ParseError(ValueError):
    """No derivation gives this text. `position`: how many characters are right; `kind`: what is
    wrong there, a kind of fact ("name", "object", "place", "number", ...), "wording", or "end"
    where the text only ends too early."""

    def __init__(self, position: int, kind: str):
        super().__init__(f"not a text of this grammar from character {position} on: {kind}")
        self.position, self.kind = position, kind


@dataclass(frozen=True)
class Derivation:
    """A text and all that is known of it."""

    text: str
    nats: float  # -log of the text's probability
    choices: tuple[int, ...]  # the option taken at each choice
    facts: tuple[tuple[int, int, str], ...]  # (start, end, kind): what earlier text has fixed
    roles: dict[str, Member] = field(compare=False)  # "hero" -> who it is


# ----------------------------------------------------------------------------------------------
# Templates are compiled once, into small trees. A tree is a string to say, a tuple of trees in a
# row, or one of the nodes here.
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # equal only to itself, whatever it is called
class Member:
    """Somebody or something that texts are about, and the forms in which it is said."""

    kind: str
    index: int  # among its kind
    forms: dict[str, str]  # "" is the plain name; the keys are those of {role.form}

    def __str__(self) -> str:
        return self.forms[""]


class Say(NamedTuple):  # {hero}, {hero.his}, {n-k}
    role: str
    form: str
    fact: bool
    other: str = ""  # the second number of a sum
    sign: int = 0


class Bind(NamedTuple):  # a member takes a role and is mentioned first
    role: str
    member: Member
    text: str


class Draw(NamedTuple):  # {hero:people}, {a colour:colours}, {k:part n}
    options: tuple[Bind, ...]
    part: str = ""  # the number of which this one is to be a part


class Scope(NamedTuple):  # <<who>>: what is told there has roles of its own
    tree: tuple | Pick


class Back(NamedTuple):  # put after a Scope by a derivation: the roles that hold again
    roles: dict[str, Member]


class Pick(NamedTuple):  # [this|that]
    options: tuple
    chances: tuple[float, ...]


def pick(options: list[list]):
    """A choice between rows of trees; "3*" before one of them is its weight."""
    rows, weights = [], []
    for row in options:
        match = re.match(r"(\d+)\*", row[0]) if row and type(row[0]) is str else None
        weights.append(int(match[1]) if match else 1)
        rows.append((row[0][match.end() :], *row[1:]) if match else tuple(row))
    if len(rows) == 1:
        return rows[0]
    return Pick(tuple(rows), tuple(w / sum(weights) for w in weights))


class Grammar:
    """Lists of members and phrases, and the trees of templates that use them.

    lists: title -> (kind, "name, name/plural, name/preposition, ..."); phrases: name -> templates.
    Numbers are members of the list "count", in order from zero. Lists share the members of a kind.
    """

    def __init__(self, lists: dict[str, tuple[str, str]], phrases: dict[str, list[str]]):
        self.phrases = phrases
        self.lists: dict[str, tuple[Member, ...]] = {}
        known: dict[tuple[str, str], Member] = {}
        said: dict[str, list[str]] = {}
        for title, (kind, names) in lists.items():
            row = []
            for entry in names.split(","):
                name, _, extra = " ".join(entry.split()).partition("/")
                forms = {"": name, "Cap": name[0].upper() + name[1:]}
                forms["a"] = "an " if name[0] in "aeiou" else "a "
                if title in PRONOUNS:
                    forms |= zip(("girl", "he", "him", "his"), PRONOUNS[title].split(), strict=True)
                    forms |= {form.title(): forms[form].title() for form in ("he", "his")}
                elif kind == "place":
                    forms |= {"at": f"{extra} the ", "At": f"{extra.title()} the "}
                elif extra:
                    forms["s"] = extra
                index = sum(k == kind for k, _ in known)
                m = known.setdefault((kind, name), Member(kind, index, {}))
                m.forms.update({**forms, **m.forms})
                said.setdefault(kind, []).extend(m.forms[f] for f in FACTS if f in m.forms)
                row.append(m)
            self.lists[title] = tuple(row)
        longest = {kind: sorted(words, key=len, reverse=True) for kind, words in said.items()}
        # by kind: everything that may be said as a fact of it
        self.patterns = {kind: re.compile("|".join(words)) for kind, words in longest.items()}

    @functools.cache  # noqa: B019  # a grammar lives as long as the program
    def template(self, text: str):
        """A template as a tree. Raises ValueError or KeyError where it is not well formed."""
        tokens = [t for t in TOKEN.split(text) if t]

        def alternatives(closing: str):
            options: list[list] = [[]]
            while (token := tokens.pop(0) if tokens else "") != closing:
                if token == "|":
                    options.append([])
                elif token == "[":
                    options[-1].append(alternatives("]"))
                elif token in ("]", ""):
                    raise ValueError(f"a bracket lacks its partner in {text!r}")
                elif token[0] == "<":
                    ways = self.phrases[token.strip("<>")]
                    # an answer is somebody else's turn to speak
                    phrase = pick([[self.template(w.replace(" => ", '" "'))] for w in ways])
                    options[-1].append(Scope(phrase) if token[1] == "<" else phrase)
                elif token[0] == "{":
                    options[-1].append(self._slot(token[1:-1]))
                else:
                    options[-1].append(token)
            return pick(options)

        return alternatives("")

    def _slot(self, text: str):
        """What stands between { and } as a node, or as two in a row."""
        text, fact = text.removeprefix("~"), text[0] != "~"
        text, _, source = text.partition(":")
        before, _, role = text.rpartition(" ")
        if source:
            source, _, form = source.partition(".")
            source, _, part = source.partition(" ")
            members = self.lists["count" if part else source]
            said = [(m.forms[before] if before else "") + m.forms[form] for m in members]
            return Draw(tuple(map(Bind, [role] * len(said), members, said)), part)
        role, _, form = role.partition(".")
        if total := re.fullmatch(r"(\w+)([+-])(\w+)", role):
            return Say(total[1], form, form in FACTS, total[3], int(total[2] + "1"))
        said = Say(role, form, fact and form in FACTS)
        return (Say(role, before, False), said) if before else said

    def plot(self, steps: list[list[str]]):
        """Steps in a row, with a space before each that says something, or an empty line."""
        rows, space = [], ""
        for step in steps:
            if step == [""]:
                space = "\n\n"
                continue
            options = []
            for way in step:
                weight, way = re.fullmatch(r"((?:\d+\*)?)(.*)", way).groups()
                options.append([weight + space, self.template(way)] if way else [weight])
            rows.append(pick(options))
            space = " "
        return tuple(rows)

    def sample(self, tree, rng: random.Random) -> Derivation:
        """A text of the tree, drawn."""
        return next(self.derivations(tree, Sampler(rng)))

    def parse(self, text: str, tree) -> Derivation:
        """The derivation of a text of the tree. Raises ParseError if there is none."""
        recognizer = Recognizer(text, self.patterns)
        for derivation in self.derivations(tree, recognizer):
            return derivation
        raise ParseError(recognizer.position, recognizer.kind)

    # One walker serves all: which options it goes into, and which of the text said so far it may go
    # on with, is the chooser's affair. Sampling is a walk with one option at a time, drawn;
    # recognising goes into all options and on only where the given text agrees.

    def derivations(self, tree, chooser) -> Iterator[Derivation]:
        """Every finished derivation that the chooser lets through.

        A path is a linked list, newest first: (before, text, kind of fact or "") for what was said,
        (before, option, chance) for what was chosen.
        """
        waiting = [((tree, None), {}, 0, None)]  # (trees to come, roles, characters said, path)
        while waiting:
            todo, roles, at, path = waiting.pop()
            while todo is not None:
                tree, todo = todo
                node = type(tree)
                kind = ""
                if node is str:
                    text = tree
                elif node is tuple:
                    for part in reversed(tree):
                        todo = (part, todo)
                    continue
                elif node is Say:
                    member = roles[tree.role]
                    if tree.sign:
                        other = int(tree.other) if tree.other.isdigit() else roles[tree.other].index
                        member = self.lists["count"][member.index + tree.sign * other]
                    text = member.forms[tree.form]
                    if tree.fact:
                        kind = member.kind
                elif node is Scope:
                    todo, roles = (tree.tree, (Back(roles), todo)), {}
                    continue
                elif node is Back:
                    roles = tree.roles
                    continue
                elif node is Bind:
                    text = tree.text
                    roles = {**roles, tree.role: tree.member}
                else:
                    options = draws(tree, roles) if node is Draw else tree.options
                    chances = (1 / len(options),) * len(options) if node is Draw else tree.chances
                    for i in chooser.choose(chances):
                        waiting.append(((options[i], todo), roles, at, (path, i, chances[i])))
                    break
                if not chooser.accept(at, text, kind):
                    break
                at += len(text)
                path = (path, text, kind)
            else:
                if chooser.accept(at, "", "end"):
                    yield finished(roles, path)


def draws(draw: Draw, roles: dict[str, Member]) -> Sequence[Bind]:
    """What a Draw may take: a number that leaves two of another, or what has no role yet."""
    if draw.part:
        return draw.options[2 : roles[draw.part].index - 1]
    taken = set(roles.values())
    return [bind for bind in draw.options if bind.member not in taken]


def finished(roles: dict[str, Member], path: tuple) -> Derivation:
    """The derivation of a finished path."""
    steps = []
    while path is not None:
        path, what, more = path
        steps.append((what, more))
    text, at, nats, choices, facts = [], 0, 0.0, [], []
    for what, more in reversed(steps):
        if type(what) is int:
            choices.append(what)
            nats -= math.log(more)
        else:
            text.append(what)
            if more:
                facts.append((at, at + len(what), more))
            at += len(what)
    return Derivation("".join(text), nats, tuple(choices), tuple(facts), roles)


class Sampler:
    """Draws one option at every choice."""

    def __init__(self, rng: random.Random):
        self.random = rng.random

    def choose(self, chances: Sequence[float]) -> tuple[int]:
        u, last = self.random(), len(chances) - 1
        for i, chance in enumerate(chances):
            u -= chance
            if u < 0 or i == last:  # rounding may leave a little behind the last
                return (i,)
        raise AssertionError("a choice without options")

    def accept(self, at: int, text: str, kind: str) -> bool:
        return True


class Recognizer:
    """Goes into all options, and on where `text` agrees; remembers how far any walk came."""

    def __init__(self, text: str, patterns: dict[str, re.Pattern]):
        self.text, self.patterns = text, patterns
        self.reached, self.position, self.kind = (-1, 0), 0, "wording"

    def choose(self, chances: Sequence[float]) -> range:
        return range(len(chances))

    def accept(self, at: int, text: str, kind: str) -> bool:
        if kind == "end":
            if at == len(self.text):
                return True
            self.failed(at, at, "wording")
            return False
        if self.text.startswith(text, at):
            return True
        wrong = self.patterns[kind].match(self.text, at) if kind else None
        if text.startswith(self.text[at : at + len(text)]):
            self.failed(len(self.text), len(self.text), "end")
        elif wrong:  # a wrong fact counts as read, and the mistake stands where it begins
            self.failed(wrong.end(), at, kind)
        elif at + len(text) >= self.reached[0]:
            n = at
            while self.text[n] == text[n - at]:
                n += 1
            self.failed(n, n, "wording")
        return False

    def failed(self, reached: int, position: int, kind: str) -> None:
        rank = {"wording": 0, "end": 2}.get(kind, 1)  # of those that came equally far
        if (reached, rank) > self.reached:
            self.reached, self.position, self.kind = (reached, rank), position, kind
