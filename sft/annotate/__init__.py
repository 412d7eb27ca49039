"""Plain reasoning traces to OpenMementos format, with the help of any OpenAI-compatible endpoint.

The five steps of MEMENTO (arXiv 2604.09852, section on data), one module each::

    sentences      text -> atomic units; code and math are never cut
    scoring        how good a cut each boundary is, 0-3, by a language model in overlapping windows
    segmentation   the best blocks for these scores, exactly
    mementos       one memento a block: written, judged, rewritten
    pipeline       all of it for many traces at once; `endpoint` talks to the model, `journal` remembers every answer

What the model is told is in ``prompts/*.md``.
"""
