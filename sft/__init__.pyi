from memento.sft.data import read_examples as read_examples
from memento.sft.rows import strip_blocks as strip_blocks
from memento.sft.tokens import add_delimiters as add_delimiters
