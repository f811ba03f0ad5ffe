"""Write ``eas_kit/tasks/definitions.txt``: 1,000 of the definitions that pretraining of the bundled model leaves out.

apt-get install wordnet-base        # WordNet 3.0, Princeton University, free licence
python data/make_definitions.py [FOLDER WITH data.noun ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from eas_kit.models.tiny.corpus import WORDNET, read_definitions

TARGET = Path(__file__).parents[1] / "eas_kit" / "tasks" / "definitions.txt"
NOTICE = """\
# 1,000 definitions of WordNet 3.0, chosen at random among those that the bundled model was not trained on.
# WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. Permission to use, copy, modify and
# distribute this database for any purpose and without fee or royalty is granted, provided that this notice and the
# statements of https://wordnet.princeton.edu/license-and-commercial-use appear on all copies. THIS DATABASE IS
# PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES, EXPRESS OR IMPLIED.
"""


def main() -> None:
    _, held_out = read_definitions(Path(sys.argv[1]) if len(sys.argv) > 1 else WORDNET)
    rng = np.random.default_rng(0)
    chosen = [held_out[i] for i in rng.permutation(len(held_out)) if "\n" not in held_out[i]][:1000]
    TARGET.write_text(NOTICE + "\n".join(chosen) + "\n", encoding="utf-8")
    print(f"wrote {TARGET} ({len(chosen)} definitions)")


if __name__ == "__main__":
    main()
