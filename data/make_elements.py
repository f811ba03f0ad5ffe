"""Write ``eas_kit/tasks/elements.csv`` from the element table of the ``mendeleev`` package (MIT licence).

    pip install mendeleev==1.3.0
    python data/make_elements.py

Only facts are taken: number, name, symbol, period, group, block, series, and whether the element is solid,
liquid or gaseous at 25 degrees Celsius, worked out from its melting and boiling points.
"""

from __future__ import annotations

import csv
import sqlite3
from importlib.util import find_spec
from pathlib import Path

ROOM_TEMPERATURE = 298.15  # kelvin
TARGET = Path(__file__).parents[1] / "eas_kit" / "tasks" / "elements.csv"

# the package's plural series names, as an adjective-like singular that fits into "gold is a ..."
CATEGORY = {
    "Nonmetals": "nonmetal",
    "Noble gases": "noble gas",
    "Alkali metals": "alkali metal",
    "Alkaline earth metals": "alkaline earth metal",
    "Metalloids": "metalloid",
    "Halogens": "halogen",
    "Poor metals": "poor metal",
    "Transition metals": "transition metal",
    "Lanthanides": "lanthanide",
    "Actinides": "actinide",
}


def state(melting: float | None, boiling: float | None, sublimes: bool) -> str:
    """State of matter at room temperature, or an empty field where the temperatures are not known.

    Where a solid sublimes (carbon), ``boiling`` is the temperature at which it does.
    """
    if melting is not None and melting > ROOM_TEMPERATURE:
        return "solid"
    if boiling is None:
        return ""
    if boiling < ROOM_TEMPERATURE:
        return "gas"
    return "solid" if sublimes else "liquid"


def century(year: int | None, discoverers: str | None) -> str:
    """Century of the discovery; "antiquity" where the source says that the ancients knew the element."""
    if year is None:
        return "antiquity" if discoverers and "ancient" in discoverers.lower() else ""
    number = (int(year) - 1) // 100 + 1
    return f"{number}{'st' if number == 21 else 'th'} century"


def rows(database: Path) -> list[dict[str, object]]:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    series = {r["id"]: r["name"] for r in connection.execute("select id, name from series")}
    temperatures: dict[int, tuple[float | None, float | None, bool]] = {}
    for r in connection.execute(
        "select atomic_number, melting_point, boiling_point, is_sublimation_point from phasetransitions "
        "where is_transition is null or is_transition = 0 order by id"
    ):
        # several allotropes (carbon, phosphorus, sulphur): the first row that names a melting point decides
        known = temperatures.get(r["atomic_number"])
        if known is None or (known[0] is None and r["melting_point"] is not None):
            temperatures[r["atomic_number"]] = (
                r["melting_point"],
                r["boiling_point"],
                bool(r["is_sublimation_point"]),
            )
    out = []
    for e in connection.execute("select * from elements order by atomic_number"):
        out.append(
            {
                "number": e["atomic_number"],
                "name": e["name"].lower(),
                "symbol": e["symbol"],
                "period": e["period"],
                "group": e["group_id"] or "",
                "block": e["block"],
                "category": CATEGORY.get(series.get(e["series_id"]), ""),
                "state": state(*temperatures.get(e["atomic_number"], (None, None, False))),
                "discovered": century(e["discovery_year"], e["discoverers"]),
            }
        )
    connection.close()
    return out


def main() -> None:
    spec = find_spec("mendeleev")
    if spec is None or spec.origin is None:
        raise SystemExit("the element table comes from the package mendeleev: pip install mendeleev==1.3.0")
    table = rows(Path(spec.origin).parent / "elements.db")
    if len(table) != 118:
        raise SystemExit(f"expected 118 elements, found {len(table)}")
    with TARGET.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print(f"wrote {TARGET} ({len(table)} elements)")


if __name__ == "__main__":
    main()
