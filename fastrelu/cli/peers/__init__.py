"""What fastrelu is measured against, and how: each peer in a process of its own.

Thread pools and allocators of several libraries in one process would disturb each
other, so each peer has a worker process.  On every case the workers take short turns:
what slows the machine for a while slows them all.
"""
