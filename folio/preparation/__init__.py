"""Text → token files.

1. ``recipes`` has the known data sets: the source, the tokenizer and the layout of each (``recipe``).
2. ``sources`` defines a source: blocks of documents; reading can begin at any block. ``text_files`` and ``hub`` are
   sources; ``finding`` lists the files that a user names.
3. ``documents`` reads the documents of a block; ``workers`` turn them into ids, in processes of their own.
4. ``writer`` writes the ids of all blocks, in order, into files that appear whole. If processes share the job, each
   writes a part of the ids, and one joins them (``parts``).
5. ``job`` runs all of this under a lock, and continues where a killed run stopped.
"""
