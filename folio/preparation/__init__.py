"""Where text comes from, and how it becomes token files.

1. ``recipes`` says what a data set is: its source, its tokenizer, its layout.
2. ``sources`` cuts any source into blocks of documents, which can be told apart and begun at any of.
3. ``workers`` turn a block into ids, in processes of their own.
4. ``writer`` puts the ids of all blocks, in order, into files that appear whole.
5. ``prepare`` runs the four, under a lock, and goes on where a killed run stopped.
"""
