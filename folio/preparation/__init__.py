"""Where text comes from, and how it becomes token files.

1. ``recipes`` has the known data sets: the source, the tokenizer and the layout of each.
2. ``sources`` says what a source is: blocks of documents, from any of which reading can begin. ``text_files`` and
   ``hub`` are such sources; ``finding`` has the files that a user names.
3. ``documents`` reads the documents of a block; ``workers`` turn them into ids, in processes of their own.
4. ``writer`` writes the ids of all blocks, in order, into files that appear whole; ``parts`` those of a shared job.
5. ``job`` runs all of this under a lock, and continues where a killed run stopped.
"""

DATA_SETS = ("shakespeare_char", "shakespeare", "stdlib", "openwebtext", "fineweb_edu")  # functions of ``recipes``
