"""All measurements of this engine that need a GPU, in one run of at most nine minutes.

__main__    the command
supervise   every section in a process of its own, with a time limit of its own
rows        figures: printed at once, kept as JSON lines, merged
tables      rows -> Markdown
bench       what a section is handed; timing: how seconds are taken
subjects    full-size models with random weights, stock and engine side by side
sections/   what is measured, a file a question
"""
