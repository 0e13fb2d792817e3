# Prints the frames of every thread of the process that gdb is attached to, as one line of JSON; run by gdb.rs.
import json

import gdb


def describe(frame):
    where = frame.find_sal()
    function = frame.function()
    return {
        "pc": frame.pc(),
        "name": frame.name(),
        # Without debug information there are only symbols, of which a function may have several.
        "known": function is not None,
        "file": where.symtab.fullname() if where.symtab else None,
        "line": where.line if where.symtab else None,
        "inlined": frame.type() == gdb.INLINE_FRAME,
        "tail_call": frame.type() == gdb.TAILCALL_FRAME,
        "signal": frame.type() == gdb.SIGTRAMP_FRAME,
    }


def frames():
    frame = gdb.newest_frame()
    while frame is not None:
        yield describe(frame)
        try:
            frame = frame.older()
        except gdb.error:
            return


threads = []
for thread in gdb.selected_inferior().threads():
    thread.switch()
    threads.append(list(frames()))
print("frames: " + json.dumps(threads))
