"""Bugs that show in a kernel's TTIR, before a GPU sees it.

    int32-offset   an offset to a pointer that was multiplied in 32 bits: right while it is below 2^31 elements, an
                   illegal access after. Flagged are products of a program's index or of a loaded integer with an
                   argument or a constant, and of two arguments (a loop's counter counts as one), unless they are
                   widened before the multiplication; widening after it is too late. A product with a constant counts
                   as an index rather than an offset once it is widened.
    float64        any operation in double precision, 32 to 64 times slower: a Python float that was not pinned to fp32
    float-atomic   an atomic addition of floats: its result depends on the order of programs
    atomic         any other atomic: programs that wait for one another

The analysis follows values through arithmetic, loops and branches of one function (Triton inlines helpers first); it
knows nothing of value ranges, so a finding may be harmless: a budget then allows it and says why.
"""

import re
from dataclasses import dataclass, field

from triton.compiler import CompiledKernel


@dataclass(frozen=True)
class Finding:
    """Something to look at: its kind, and where in the source."""

    kind: str
    message: str


@dataclass
class _Operation:
    name: str
    results: list[str]
    operands: list[str]
    text: str
    place: str = ""


def lint(kernel: CompiledKernel | str) -> list[Finding]:
    """Findings in a compiled kernel, or in the text of its TTIR, without repetitions."""
    ttir = kernel if isinstance(kernel, str) else kernel.asm["ttir"]
    operations, arguments = _parse(ttir)
    findings = _int32_offsets(operations, arguments)
    signature = next((line for line in ttir.splitlines() if "tt.func public" in line), "")
    if re.search(r"\bf64\b", signature):
        findings.append(Finding("float64", "an argument is in double precision"))
    for operation in operations:
        if re.search(r"\bf64\b|xf64\b", operation.text):
            findings.append(Finding("float64", f"{operation.name} at {operation.place}"))
        if operation.name.startswith("tt.atomic"):
            kind = "float-atomic" if re.search(r"\bfadd\b", operation.text) else "atomic"
            findings.append(Finding(kind, f"{operation.name} at {operation.place}"))
    return list(dict.fromkeys(findings))


# --- reading TTIR

_OPERATION = re.compile(r'^\s*(?:(%[\w]+)(?::(\d+))? = )?"?([a-z_]\w*\.[\w.]+)"?(.*)$')
_VALUE = re.compile(r"%\w+(?:#\d+)?")
_COPY = "copy"
_REGION_OWNERS = ("scf.for", "scf.if", "scf.while")


def _parse(ttir: str) -> tuple[list[_Operation], list[str]]:
    """Operations of the kernel, and its 32-bit integer arguments. What loops and branches hand on becomes copies."""
    places = _places(ttir)
    operations: list[_Operation] = []
    arguments: list[str] = []
    regions: list[_Operation] = []
    for line in ttir.splitlines():
        body, _, location = line.partition(" loc(")
        if "tt.func" in line:
            arguments += re.findall(r"(%\w+): i32\b", line)
            continue
        if body.strip().startswith("}"):
            if regions and "{" not in body:
                regions.pop()
            continue
        match = _OPERATION.match(body)
        if match is None:
            continue
        operation = _operation(match)
        operation.place = places.get(location.rstrip(") "), "an unknown line")
        operations.append(operation)
        operations += _handed_on(operation, regions)
        if body.rstrip().endswith("{"):
            regions.append(operation)
    return operations, arguments


def _operation(match: re.Match[str]) -> _Operation:
    result, count, name, rest = match.groups()
    results = [f"{result}#{i}" for i in range(int(count))] if count else [result] if result else []
    return _Operation(name, results, _VALUE.findall(rest), rest.rstrip())


def _handed_on(operation: _Operation, regions: list[_Operation]) -> list[_Operation]:
    """Copies from what a loop starts with and yields to its arguments and results."""
    copies = []
    if operation.name in ("scf.for", "scf.while"):
        pairs = re.findall(r"(%\w+) = (%\w+(?:#\d+)?)", operation.text)
        if operation.name == "scf.for":  # the first pair is the counter and its lower bound
            pairs = pairs[1:]
        operation.operands = [argument for argument, _ in pairs]
        copies += [_Operation(_COPY, [argument], [initial], "") for argument, initial in pairs]
        copies += [_Operation(_COPY, [r], [i], "") for r, (_, i) in zip(operation.results, pairs, strict=False)]
    owner = next((region for region in reversed(regions) if region.name in _REGION_OWNERS), None)
    if operation.name == "scf.yield" and owner is not None:
        targets = [owner.results] + ([owner.operands] if owner.name != "scf.if" else [])
        for target in targets:
            copies += [_Operation(_COPY, [t], [v], "") for t, v in zip(target, operation.operands, strict=False)]
    return copies


def _places(ttir: str) -> dict[str, str]:
    """`#loc12` -> "norm.py:88"."""
    direct = re.findall(r'^(#loc\d*) = loc\("([^"]+)":(\d+):\d+\)', ttir, re.M)
    places = {name: f"{path.rsplit('/', 1)[-1]}:{line}" for name, path, line in direct}
    # Named locations, and call sites (where the helper is, then where it was called), lead to others.
    chains = re.findall(r'^(#loc\d*) = loc\((?:"[^"]*"\(|callsite\()(#loc\d*)', ttir, re.M)
    for _ in range(8):
        places.update({name: places[other] for name, other in chains if other in places})
    return places


# --- offsets

_NOT_INTEGERS = ("arith.cmpi", "tt.load", "tt.addptr", "arith.sitofp", "arith.uitofp")
_SHRINKING = ("arith.divsi", "arith.divui", "arith.remsi", "arith.remui")


@dataclass
class _Facts:
    """What is known of values by their names.

    strength: 1 for an argument or a loop's counter, 2 for a program's index or a loaded integer.
    product: 1 for an index, 2 for an offset, with the place of the multiplication.
    """

    strength: dict[str, int] = field(default_factory=dict)
    product: dict[str, tuple[int, str]] = field(default_factory=dict)

    def mark(self, values: list[str], strength: int, product: tuple[int, str] = (0, "")) -> bool:
        """Note at least that much of each value; whether any of it is news."""
        changed = False
        for value in values:
            if strength > self.strength.get(value, 0):
                self.strength[value], changed = strength, True
            if product[0] > self.product.get(value, (0, ""))[0]:
                self.product[value], changed = product, True
        return changed


def _int32_offsets(operations: list[_Operation], arguments: list[str]) -> list[Finding]:
    facts = _Facts()
    facts.mark(arguments, 1)
    while any([_follow(operation, facts) for operation in operations]):  # all of them, until nothing is learnt
        pass
    places = []
    for operation in operations:
        if operation.name == "tt.addptr" and len(operation.operands) > 1:
            kind, place = facts.product.get(operation.operands[1], (0, ""))
            wide = operation.text.rstrip(" >").endswith("i64")
            if kind == 2 or (kind == 1 and not wide):
                places.append(place)
    return [Finding("int32-offset", f"32-bit product at {place} is an offset to a pointer") for place in places]


def _follow(operation: _Operation, facts: _Facts) -> bool:
    """Learn what one operation's results are from its operands; whether anything was new."""
    name, text = operation.name, operation.text
    if name == "scf.for":
        counter, *bounds = _VALUE.findall(text)[:4]
        known = [facts.strength.get(bound, 0) for bound in bounds]
        return text.endswith(": i32 {") and facts.mark([counter], max(known[0], min(1, max(known))))
    if name == "tt.get_program_id" or (name == "tt.load" and "ptr<i32>" in text):
        return facts.mark(operation.results, 2)
    if name in _NOT_INTEGERS:
        return False
    narrow = bool(re.search(r"(\b|x)i32>?$", text)) or name in (_COPY, "tt.reduce")
    strengths = [facts.strength.get(operand, 0) for operand in operation.operands] or [0]
    product = max((facts.product.get(operand, (0, "")) for operand in operation.operands), default=(0, ""))
    if name in _SHRINKING or (product[0] == 1 and not narrow):
        product = (0, "")
    if name == "arith.muli" and narrow and max(strengths):
        kind = 2 if min(strengths) > 0 else 1 if max(strengths) == 2 else 0
        product = max(product, (kind, operation.place if kind else ""))
    return facts.mark(operation.results, max(strengths) if narrow else 0, product)
