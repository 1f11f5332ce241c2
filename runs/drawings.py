"""The drawings of docs/how-it-works.md: a tree, its mask, a round on a time line, and GliDe's cross-attention.

.venv/bin/python runs/drawings.py [FOLDER]        # docs/images unless told otherwise

The tree and the mask are those of a real `TokenTree`, and `verify_points` decides what is accepted. The same input gives the
same bytes; tests/test_site.py compares them. Colours follow the reader's light or dark mode.
"""

import sys
from html import escape
from pathlib import Path

import torch

from glidecape.core.tree import TokenTree
from glidecape.core.verify import verify_points

STYLE = """
text { font: 14px system-ui, sans-serif; fill: var(--ink) } .small { font-size: 12px; fill: var(--faint) }
.bold { font-weight: 600 } .mid { text-anchor: middle } .end { text-anchor: end } .white { fill: var(--paper) }
.paper { fill: var(--paper) } .box { fill: var(--soft); stroke: var(--faint) }
.edge { stroke: var(--faint); stroke-width: 1.5; fill: none } .taken { stroke: var(--yes); stroke-width: 3.5; fill: none }
.read { stroke: var(--target); stroke-width: 1.5; fill: none }
.draft { fill: var(--draft) } .target { fill: var(--target) } .yes { fill: var(--yes) }
.no { fill: none; stroke: var(--grid) } .bonus { fill: none; stroke: var(--target); stroke-width: 2; stroke-dasharray: 4 3 }
svg { --paper: #ffffff; --ink: #1f2328; --faint: #636c76; --soft: #eef1f4; --grid: #d0d7de;
  --draft: #4f74c9; --target: #b3541e; --yes: #2f7d4f }
@media (prefers-color-scheme: dark) { svg { --paper: #1e2129; --ink: #e6e8eb; --faint: #9aa4af; --soft: #2b303b;
  --grid: #434b57; --draft: #8aa6ee; --target: #f0965a; --yes: #6cc48f } }
"""


class Picture:
    """An SVG that grows line by line; sizes are pixels."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self.title, self.width, self.height = title, width, height
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, radius: int = 4) -> None:
        size = f'width="{width:g}" height="{height:g}" rx="{radius}"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" {size} class="{kind}"/>')

    def line(self, points: str, kind: str) -> None:
        self.parts.append(f'<path d="{points}" class="{kind}"/>')

    def write(self, path: Path) -> None:
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        paper = f'<rect width="{self.width}" height="{self.height}" rx="8" class="paper"/>'
        lines = [head, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>", paper, *self.parts, "</svg>"]
        path.write_text("\n".join(lines) + "\n")


# What CaPE drafts after "def add(a, b): return": of each depth the chain's token and its siblings, with their probabilities.
DRAFTED = [[("a", 0.93)], [("+", 0.41), ("-", 0.33), ("*", 0.12)], [("b", 0.88)], [("\\n", 0.62), (")", 0.17)]]
CHOSEN = {"return": "a", "a": "-", "-": "b"}  # what the target says after each token
WORDS = ["return", *(word for depth in DRAFTED for word, _ in depth)]


def proposal() -> TokenTree:
    """The tree of `DRAFTED`; the token of node n is n."""
    tree, parent, number = TokenTree(torch.tensor([0]), capacity=len(WORDS)), 0, 1
    for depth in DRAFTED:
        tokens = torch.arange(number, number + len(depth))[None]
        above = torch.full_like(tokens, parent)
        added = tree.add(above, tokens, torch.tensor([[chance for _, chance in depth]]).log())
        parent, number = int(added[0, 0]), number + len(depth)
    return tree


def accepted(tree: TokenTree) -> list[int]:
    """The path that the target accepts, as the shipped code decides it."""
    said = torch.full((1, tree.nodes), len(WORDS))  # an id for every token that was not drafted
    for node, below in enumerate(tree.children(0)):
        said[0, node] = next((n for n in below if WORDS[n] == CHOSEN.get(WORDS[node])), len(WORDS))
    return [node for node in verify_points(tree, said).path[0].tolist() if node >= 0]


def draw_tree(tree: TokenTree, path: list[int]) -> Picture:
    picture = Picture("A proposal: a chain with siblings, and the path that the target accepts", 720, 300)
    at: dict[int, tuple[float, float]] = {0: (70, 70)}
    for node, below in enumerate(tree.children(0)):
        for k, child in enumerate(below):
            at[child] = (at[node][0] + 135, at[node][1] + 62 * k)
    for child in range(1, tree.nodes):
        (x0, y0), (x1, y1) = at[int(tree.parents[0, child])], at[child]
        kind = "taken" if child in path else "edge"
        picture.line(f"M{x0:g} {y0:g} C{x0 + 70:g} {y0:g} {x1 - 70:g} {y1:g} {x1:g} {y1:g}", kind)
    end_x, end_y = at[path[-1]]
    picture.line(f"M{end_x + 38:g} {end_y:g} L{end_x + 97:g} {end_y:g}", "taken")
    picture.box(end_x + 97, end_y - 18, 76, 36, "bonus", 18)
    picture.text(end_x + 135, end_y + 5, CHOSEN[WORDS[path[-1]]], "mid bold")
    for node, (x, y) in at.items():
        kind = "target" if node == 0 else "yes" if node in path else "draft"
        picture.box(x - 38, y - 18, 76, 36, kind, 18)
        picture.text(x, y + 5, WORDS[node], "mid bold white")
        if node:
            above = int(tree.parents[0, node])
            chance = float((tree.score[0, node] - tree.score[0, above]).exp())
            picture.text(x, y + 34, f"{chance:.0%}", "mid small")
    for depth in range(len(DRAFTED) + 1):
        name = "root" if depth == 0 else f"depth {depth}"
        picture.text(70 + 135 * depth, 34, name, "mid small")
    legend(picture, 276, [("yes", "accepted"), ("draft", "drafted"), ("target", "root"), ("bonus", "bonus token")])
    return picture


def legend(picture: Picture, y: float, entries: list[tuple[str, str]]) -> None:
    x = 32.0
    for kind, words in entries:
        picture.box(x, y - 12, 22, 14, kind)
        picture.text(x + 30, y, words, "small")
        x += 60 + 7.5 * len(words)


def draw_mask(tree: TokenTree) -> Picture:
    cell, left, top = 42, 130, 70
    prefix = ["def", "add", "(a, b)", ":"]
    columns = [*prefix, *WORDS[: tree.nodes]]
    width, height = left + cell * len(columns) + 30, top + cell * tree.nodes + 50
    picture = Picture("The mask of that tree: what each node may read", width, height)
    picture.text(left + cell * 2, 24, "committed", "mid small")
    picture.text(left + cell * (4 + tree.nodes / 2), 24, "nodes of the tree", "mid small")
    picture.text(left - 12, top - 12, "node ↓ reads →", "end small")
    for column, word in enumerate(columns):
        picture.text(left + cell * (column + 0.5), top - 12, word, "mid small")
    for node in range(tree.nodes):
        y = top + cell * node
        picture.text(left - 12, y + 22, WORDS[node], "end bold")
        for column in range(len(columns)):
            inside = column >= len(prefix)
            seen = bool(tree.ancestors[0, node, column - len(prefix)]) if inside else True
            kind = ("draft" if inside else "target") if seen else "no"
            picture.box(left + cell * column + 3, y + 3, cell - 6, cell - 6, kind)
    y = top + cell * tree.nodes + 32
    legend(picture, y, [("target", "committed keys"), ("draft", "itself and its ancestors"), ("no", "hidden")])
    return picture


def draw_round() -> Picture:
    """Four tokens by plain decoding and by a round, to scale for c = 0.15 and v(n) = 1.1."""
    unit, left = 125, 150
    picture = Picture("A round on a time line, beside plain decoding", 720, 300)
    picture.text(20, 66, "plain decoding", "bold")
    for k in range(4):
        picture.box(left + unit * k, 42, unit - 4, 38, "target")
        picture.text(left + unit * (k + 0.5), 66, "target", "mid white")
        picture.text(left + unit * (k + 1) - 6, 100, f"token {k + 1}", "end small")
    picture.text(20, 166, "one round", "bold")
    draft, verify = 0.15 * unit, 1.1 * unit
    for k in range(4):
        picture.box(left + draft * k, 142, draft - 3, 38, "draft")
    picture.text(left + draft * 2, 134, "4 draft steps", "mid small")
    start = left + 4 * draft
    picture.box(start, 142, verify - 4, 38, "target")
    picture.text(start + verify / 2, 166, "target, 5 nodes", "mid white")
    end = start + verify
    picture.line(f"M{end:g} 136 L{end:g} 210", "edge")
    picture.text(end + 10, 158, "3 accepted tokens and the bonus token:", "")
    picture.text(end + 10, 178, "4 tokens, acceptance length 4", "bold")
    picture.text(left, 234, "Time of a round = draft steps x c + v(n), in units of a plain target forward:", "small")
    picture.text(left, 252, "4 x 0.15 + 1.1 = 1.7 here, for 4 tokens. Plain decoding takes 4.", "small")
    legend(picture, 284, [("target", "the target runs"), ("draft", "the draft runs")])
    return picture


def draw_cross_attention() -> Picture:
    picture = Picture("GliDe: one draft layer that reads the target's cache", 720, 400)
    picture.text(30, 32, "target (frozen)", "bold")
    for k in range(8):
        y, read = 292 - 32 * k, k == 5
        picture.box(30, y, 150, 26, "target" if read else "box")
        picture.text(
            105, y + 18, f"layer {k}" + (" keys, values" if read else ""), "mid white" if read else "mid small"
        )
    picture.text(30, 338, "its cache: the committed", "small")
    picture.text(30, 354, "tokens, before the root", "small")
    picture.text(480, 32, "draft (one layer)", "bold")
    blocks = [("embedding, the target's", "box"), ("self-attention, own cache", "draft"), ("cross-attention", "draft")]
    blocks += [("feed-forward network", "draft"), ("head, the target's", "box")]
    for k, (words, kind) in enumerate(blocks):
        y = 268 - 54 * k
        picture.box(480, y, 200, 34, kind)
        picture.text(580, y + 22, words, "mid white" if kind == "draft" else "mid small")
        if k:
            picture.line(f"M580 {y + 54} L580 {y + 36}", "edge")
    picture.line("M180 145 C330 145 330 177 474 177", "read")
    picture.line("M466 172 L476 177 L466 182", "read")
    picture.text(330, 134, "keys and values are read as they lie", "mid small")
    picture.text(330, 224, "only queries and outputs", "mid small")
    picture.text(330, 240, "have weights", "mid small")
    for k, words in enumerate(("root: lag 1", "depth 1: lag 2", "depth 2: lag 3")):
        picture.box(245 + 152 * k, 330, 142, 28, "draft")
        picture.text(316 + 152 * k, 349, words, "mid white")
    picture.text(245, 382, "All nodes of a round read the same keys: those before the root.", "small")
    return picture


def main(folder: Path) -> None:
    tree = proposal()
    pictures = {"tree": draw_tree(tree, accepted(tree)), "mask": draw_mask(tree)}
    pictures |= {"round": draw_round(), "cross-attention": draw_cross_attention()}
    for name, picture in pictures.items():
        picture.write(folder / f"{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
