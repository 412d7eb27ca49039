"""Two-stage SFT: full attention first, then memento attention, through TRL's SFTTrainer under DeepSpeed.

`memento.sft.train` runs one stage as its own process; `memento.sft.data` turns traces into packed rows;
`memento.sft.tokens` gives a model the four delimiters.
"""

from memento.links import package

__path__, __getattr__ = package(
    __file__,
    add_delimiters="memento.sft.tokens",
    read_examples="memento.sft.data",
    strip_blocks="memento.sft.rows",
)
