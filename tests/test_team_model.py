"""The team's algorithm under every interleaving: its own lines, run as Python.

Each thread stops before every word it reads or writes, and only one goes on at a time.
Who that is, a schedule decides.  For small teams all schedules are tried: a state that
was seen before needs no second look, so there is an end to them.  For larger ones the
schedules are random.
"""

import random
import sys
import threading

import numpy as np
import pytest

from fastrelu.cpu import openmp, threads

pytestmark = pytest.mark.model

FILE = threads.__file__


def interpret(monkeypatch):
    """Have the team's compiled functions run as the Python that they are."""
    for name, value in list(vars(threads).items()):
        if hasattr(value, "py_func"):
            monkeypatch.setattr(threads, name, value.py_func)


class Ended(BaseException):
    """Ends a thread whose run is over."""


class Task:
    """A thread of the model."""

    def __init__(self, model, work):
        self.model, self.work = model, work
        self.turn = threading.Semaphore(0)
        self.access = (
            None  # (word, whether it is written, whether atomically): the next
        )
        self.lock = None  # what it waits for
        self.mode = 0  # of its processor's floating-point numbers
        self.alone = 0  # 1 if its loops are to stay with it
        self.number = 0  # among PyTorch's threads
        self.done = False
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        try:
            self.turn.acquire()
            self.model.check_end()
            self.work()
            self.done, self.access = True, None
            self.model.go_on(self)
        except Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised again
            self.model.end(error)

    def place(self, frame):
        """Where in the team's code it is, and with what in hand."""
        found = [self.done, self.lock, self.access, self.mode]
        while frame is not None:
            if frame.f_code.co_filename == FILE:
                held = [i for i in frame.f_locals.items() if i[0] != "team"]
                found.append((frame.f_lasti, *held))
            frame = frame.f_back
        return tuple(found)


class Loop:
    """A loop that was brought to the team."""

    def __init__(self, size, mode):
        self.hits, self.mode = [0] * size, mode
        self.runs = True  # until its owner goes on


class Words(list):
    """The team's memory; to read or write a word of it plainly is a step as well."""

    def __init__(self, model, size):
        super().__init__([0] * size)
        self.model = model

    def __getitem__(self, i):
        self.model.step((i, False, False))
        return super().__getitem__(i)

    def __setitem__(self, i, value):
        self.model.step((i, True, False))
        super().__setitem__(i, value)

    def peek(self, i):
        return super().__getitem__(i)

    def poke(self, i, value):
        super().__setitem__(i, value)


class Model:
    """A team whose members, and those who bring loops to it, take turns."""

    def __init__(self, members, choose):
        self.words = Words(self, threads._MEMBER + members * threads._MEMBER_SIZE)
        self.words.poke(threads._WORKERS, members - 1)
        self.words.poke(threads._LOOKS, 1)
        self.words.poke(threads._THREAD, members % 2)  # numbers, as on Linux, or none
        self.held, self.loops = set(), []
        for me in range(members):
            lock = threads._MEMBER + me * threads._MEMBER_SIZE + threads._LOCK
            self.words.poke(lock, 7000 + me)
            self.held.add(7000 + me)
        self.members = [
            Task(self, lambda me=me: threads._member(me)) for me in range(1, members)
        ]
        self.tasks, self.owners, self.choose = [*self.members], [], choose
        self.limit, self.workers = members, set()
        self.words.poke(threads._GET_PLACE, "place")
        self.awake = lambda: False  # whether PyTorch's threads are
        self.theirs, self.late = [], []
        self.over, self.error = threading.Event(), None

    # The steps ------------------------------------------------------------------------

    def step(self, access=None):
        """Let others go first; `access` says what will be done."""
        self.running.access = access
        self.go_on(self.running)

    def go_on(self, me):
        self.check_races()
        ready = [t for t in self.tasks if not t.done and t.lock not in self.held]
        if not ready:
            self.check_rest()
        # Whoever went last comes first.
        ready.sort(key=lambda task: task is not me)
        chosen = self.choose(self, ready) if ready else None
        if chosen is None:
            self.end()
        self.check_end()
        if chosen is me:
            return
        self.running = chosen
        chosen.turn.release()
        if not me.done:
            me.turn.acquire()
            self.check_end()

    def check_races(self):
        """Nobody is about to write a word plainly that another is about to touch."""
        touched = {}
        for task in self.tasks:
            if task.access is not None:
                word, written, atomic = task.access
                for also_written, also_atomic in touched.get(word, ()):
                    plain = not (atomic and also_atomic)
                    assert not (plain and (written or also_written)), f"word {word}"
                touched.setdefault(word, []).append((written, atomic))

    def check_end(self):
        if self.over.is_set():
            raise Ended

    def end(self, error=None):
        self.error = self.error or error
        self.over.set()

    def run(self):
        """Run to the end: all loops are done, and all members asleep."""
        for task in self.tasks:
            task.thread.start()
        self.running = self.tasks[-1]
        self.running.turn.release()
        assert self.over.wait(60)
        for task in self.tasks:
            task.turn.release()
            task.thread.join()
        if self.error is not None:
            raise self.error

    def state(self):
        """All that can make a difference from here on."""
        frames = sys._current_frames()
        places = [task.place(frames.get(task.thread.ident)) for task in self.tasks]
        loops = [(loop.runs, *loop.hits) for loop in self.loops]
        return tuple(self.words), frozenset(self.held), *loops, *places

    # What the team's code calls -------------------------------------------------------

    def install(self, patch):
        for name in ("load", "store", "add", "swap", "sleep", "wake"):
            patch.setattr(threads, f"_{name}", getattr(self, name))
        patch.setattr(threads, "_team", lambda: self.words)
        patch.setattr(threads, "_mode", lambda: self.running.mode)
        patch.setattr(threads, "_set_mode", self.set_mode)
        patch.setattr(threads, "_look_away", lambda: None)
        patch.setattr(threads, "_keep_away", lambda words, member: self.step())
        patch.setattr(threads, "_call_loop", self.call_loop)
        patch.setattr(threads, "_call_int", self.call_int)
        patch.setattr(threads, "_own_word", lambda key: self.running.alone)
        patch.setattr(threads, "_are_awake", lambda words: self.awake())
        patch.setattr(threads, "_call_fork", self.call_fork)

    def load(self, words, i):
        self.step((i, False, True))
        return words.peek(i)

    def store(self, words, i, value):
        self.step((i, True, True))
        words.poke(i, value)

    def add(self, words, i, value):
        self.step((i, True, True))
        before = words.peek(i)
        words.poke(i, before + value)
        return before

    def swap(self, words, i, old, new):
        self.step((i, True, True))
        if words.peek(i) != old:
            return False
        words.poke(i, new)
        return True

    def set_mode(self, mode):
        assert mode >= 0
        assert self.running not in self.owners, "a host's mode is changed"
        self.running.mode = mode

    def sleep(self, lock, wait):
        assert wait == 1
        self.running.lock = lock
        self.step()
        self.running.lock = None
        self.held.add(lock)

    def wake(self, lock):
        self.step()
        assert lock in self.held, "a lock is released that nobody took"
        self.held.remove(lock)

    def call_loop(self, function, values):
        arguments, start, stop = values
        assert arguments == -function
        loop = self.loops[function - 1]
        self.workers.add(self.running)
        theirs = self.words.peek(threads._THEIRS) and self.awake()
        self.late.append(theirs and self.running in self.members)
        assert self.running.mode == loop.mode, "a piece is done in another mode"
        self.step()
        for i in range(start, stop):
            assert loop.runs, "a loop is touched whose owner went on"
            loop.hits[i] += 1
        self.step()
        assert loop.runs, "an owner went on before its loop was done"

    def call_int(self, function, values):
        return self.running.number if function == "place" else self.limit

    def call_fork(self, function, values):
        """What OpenMP does: all work, and whoever asked waits for the last."""
        _, data, number, _ = values
        owner, left = self.running, number - 1
        barrier = f"barrier {len(self.tasks)}"

        def work():
            nonlocal left
            task, task.mode = self.running, 5
            threads._join(data)
            assert task.mode == 5, "it keeps another mode than its own"
            left -= 1
            if left == 0:
                self.held.discard(barrier)

        self.held.add(barrier)
        for place in range(1, number):
            task = Task(self, work)
            task.number = place
            self.tasks.append(task)
            self.theirs.append(task)
            task.thread.start()
        threads._join(data)
        owner.lock = barrier
        self.step()
        owner.lock = None

    # Who brings loops -----------------------------------------------------------------

    def owner(self, *loops):
        """Add a thread that brings loops of these sizes, grains, bytes moved and modes."""

        def work():
            for size, grain, moved, mode in loops:
                owner.mode = mode
                self.loops.append(Loop(size, mode))
                loop, function = self.loops[-1], len(self.loops)
                threads._share(function, -function, size, grain, moved)
                assert loop.hits == [1] * size
                assert owner.mode == mode
                loop.runs = False

        owner = Task(self, work)
        self.owners.append(owner)
        self.tasks.append(owner)
        return owner

    def check_rest(self):
        """All is done, and whoever comes next finds everything in its place."""
        assert all(owner.done for owner in self.owners), "an owner waits for ever"
        for word in (threads._BUSY, threads._PENDING, threads._WAITING):
            assert self.words.peek(word) == 0
        for me in range(1, len(self.members) + 1):
            words = threads._MEMBER + me * threads._MEMBER_SIZE
            assert self.words.peek(words + threads._ASLEEP) == 1
            assert self.words.peek(words + threads._LOCK) in self.held


@pytest.fixture
def team(monkeypatch):
    """Return `team(members, choose)`; what the members do is Python."""
    interpret(monkeypatch)

    def make(members, choose):
        model = Model(members, choose)
        model.install(monkeypatch)
        return model

    return make


def every_schedule(make):
    """Run the model of make(choose) under every schedule; return how many states it has.

    A run goes on from a choice that was left, and ends where another was before.
    """
    seen, left = set(), [[]]

    def choose(model, ready):
        if len(ready) == 1:
            return ready[0]
        tasks = [model.tasks.index(task) for task in ready]
        if len(path) < len(given):
            tasks = [given[len(path)]]
        else:
            state = model.state()
            if state in seen:
                return None
            seen.add(state)
        left.extend([*path, other] for other in tasks[1:])
        path.append(tasks[0])
        return model.tasks[tasks[0]]

    while left:
        path, given = [], left.pop()
        make(choose).run()
    return len(seen)


MUCH, LITTLE = threads.MUCH, 2 * threads.SHARE


@pytest.mark.parametrize(
    ("pieces", "moved"), [(2, MUCH), pytest.param(3, LITTLE, marks=pytest.mark.long)]
)
def test_every_schedule_of_two(team, pieces, moved):
    def make(choose):
        model = team(2, choose)
        model.owner((pieces, 1, moved, 1))
        return model

    assert every_schedule(make) > 1000


@pytest.mark.long
def test_every_schedule_of_two_modes(team):
    """A member that comes late to one loop may find another, with another mode."""

    def make(choose):
        model = team(2, choose)
        model.owner((2, 1, MUCH, 1), (2, 1, MUCH, 2))
        return model

    assert every_schedule(make) > 1000


def with_theirs(model, number):
    model.words.poke(threads._THEIRS, number)
    model.awake = lambda: True


@pytest.mark.long
@pytest.mark.parametrize("pieces", [2, 3])
def test_every_schedule_with_one_of_pytorchs_threads(team, pieces):
    def make(choose):
        model = team(2, choose)
        with_theirs(model, 2)
        model.owner((pieces, 1, MUCH, 1))
        return model

    assert every_schedule(make) > 100


def test_all_of_pytorchs_threads_have_a_part(team):
    """And members of ours, who are awake, have none."""
    rng, workers = random.Random(0), set()
    for _ in range(30):
        model = team(3, lambda model, ready: rng.choice(ready))
        with_theirs(model, 3)
        model.owner((12, 1, MUCH, 1), (12, 1, MUCH, 2))
        model.run()
        assert not model.workers & {*model.members}
        workers |= {model.theirs.index(t) % 2 for t in model.workers - {*model.owners}}
    assert workers == {0, 1}


def test_a_member_that_comes_late_to_a_loop_of_pytorchs_threads(team):
    """It has seen the loop before, and may still be at work when all of them are done."""
    rng, late = random.Random(1), 0

    def choose(model, ready):
        return ready[0] if rng.random() < calm else rng.choice(ready)

    for _ in range(300):
        calm = rng.choice((0.5, 0.9, 0.98))
        model = team(2, choose)
        with_theirs(model, 2)
        model.awake = lambda loops=model.loops: len(loops) % 2 == 0
        model.owner(*[(4, 1, MUCH, 1), (4, 1, MUCH, 1)] * 2)
        model.run()
        late += any(model.late)
    assert late


def test_where_pytorchs_threads_may_trap(team, monkeypatch):
    """They leave the loop to its owner; signals would come to the wrong thread."""
    model = team(3, lambda model, ready: ready[-1])
    with_theirs(model, 3)
    owner = model.owner((8, 1, MUCH, 0))
    mode = lambda: 0 if model.running is owner else -1
    monkeypatch.setattr(threads, "_mode", mode)
    model.run()
    assert model.workers == {owner}


def test_who_they_are(monkeypatch):
    """Each writes its number to a word of its own, as far as there are any."""
    interpret(monkeypatch)
    words, told = [0] * threads._MEMBER, [0] * threads._MOST

    def add(words, i, value):
        words[i] += value
        return words[i] - value

    monkeypatch.setattr(threads, "_team", lambda: words)
    monkeypatch.setattr(threads, "_add", add)
    monkeypatch.setattr(threads, "_call_int", lambda *_: 42)
    monkeypatch.setattr(threads, "array_at", lambda address, size, dtype: told)
    threads._tell(0)
    threads._tell(0)
    words[threads._JOINED] = threads._MOST
    threads._tell(0)
    assert told == [42, 42] + [0] * (threads._MOST - 2)


class Clocks:
    """Threads of PyTorch, and how long each has had a processor"""

    def __init__(self, monkeypatch, number):
        self.words = words = [0] * threads._MEMBER
        words[threads._OWNER], words[threads._THEIRS] = 77, number
        self.most, self.me, self.nanoseconds = number, 77, {}
        for k in range(min(number - 1, openmp.ASKED)):
            words[threads._CLOCKS + threads._CLOCK_SIZE * k] = -9 - k
            self.nanoseconds[-9 - k] = 3_000_000_000 + k
        self.goes_on, self.asked = set(self.nanoseconds), []
        self.nanoseconds[openmp.WALL] = 7_000_000_000
        monkeypatch.setattr(threads, "_own_number", lambda: self.me)
        monkeypatch.setattr(threads, "_call_int", lambda *_: self.most)
        monkeypatch.setattr(threads, "_address", lambda words, i: i)
        monkeypatch.setattr(threads, "_call_clock", self.call_clock)

    def call_clock(self, function, arguments):
        clock, at = arguments
        if clock not in self.nanoseconds:
            return -1
        if clock != openmp.WALL:
            self.asked.append(clock)
        self.nanoseconds[clock] += 400 if clock in self.goes_on else 0
        self.words[at : at + 2] = divmod(self.nanoseconds[clock], 1_000_000_000)
        return 0

    def are_awake(self):
        del self.asked[:]
        return threads._are_awake(self.words)

    def loop(self, late=False):
        """Say whether it is theirs"""
        awake = self.are_awake()
        if awake:
            threads._learn(self.words, late)
        return awake


@pytest.fixture
def clocks(monkeypatch):
    interpret(monkeypatch)
    return lambda number: Clocks(monkeypatch, number)


@pytest.mark.parametrize("number", [2, 3, 5, 64])
def test_who_is_awake(clocks, number):
    found = clocks(number)
    assert found.are_awake()
    last = -9 - min(number - 2, 3)
    found.goes_on -= {last}  # it falls asleep
    assert not found.are_awake()
    assert found.asked.count(last) == 1  # that is enough for who has slept since
    found.nanoseconds[last] += 400  # it was awake for a moment meanwhile
    assert not found.are_awake()
    found.goes_on |= {last}
    assert found.are_awake()


def test_for_whom_they_are_awake(clocks):
    found = clocks(3)
    found.me = 78
    assert not found.are_awake()
    found.me, found.most = 77, 2  # torch.set_num_threads(2)
    assert not found.are_awake()
    assert not found.asked
    found.most = 3
    assert found.are_awake()
    del found.nanoseconds[-10]  # it has ended
    assert not found.are_awake()
    assert found.words[threads._THEIRS] == 0


def test_another_threads_turn(clocks):
    """It comes once there were so many of its loops, and none of the owner's."""
    found = clocks(2)
    for _ in range(2):
        for found.me in [78] * (threads._FORGOTTEN - 1) + [77]:
            found.are_awake()
    assert found.words[threads._THEIRS] == 2
    found.me = 78
    for _ in range(threads._FORGOTTEN):
        assert not found.are_awake()
    assert found.words[threads._THEIRS] == 0


def test_after_loops_that_went_well_they_are_looked_at_now_and_then(clocks):
    found = clocks(2)
    found.words[threads._NEEDED] = threads._FEW
    looked = []
    for _ in range(threads._FEW + 2 * threads._AGAIN):
        assert found.loop()
        looked.append(bool(found.asked))
    now_and_then = [True] + [False] * (threads._AGAIN - 1)
    assert looked == [True] * threads._FEW + 2 * now_and_then
    assert found.loop()
    found.goes_on.clear()  # they fall asleep
    for _ in range(threads._AGAIN - 1):
        assert found.loop()
    assert not found.loop()
    assert not found.loop()
    assert found.words[threads._NEEDED] == threads._FEW


def test_after_a_loop_that_somebody_came_late_to(clocks):
    """Whoever is to come must have had a processor since it was last looked at."""
    found = clocks(2)
    (clock,) = found.goes_on
    found.words[threads._NEEDED] = 10**9  # clocks are read each time
    assert found.loop(late=True)

    def later(share):
        """Say whether a loop is theirs who had a processor for this share of a while"""
        found.nanoseconds[openmp.WALL] += 10**6
        found.nanoseconds[clock] += int(share * 10**6)
        return found.loop()

    for _ in range(3):
        assert not later(0.5)
    for _ in range(threads._DOUBTFUL):
        assert later(1)
        assert not later(0.8) or found.words[threads._DOUBT] == 0
    assert later(0.5)


def test_loops_that_somebody_came_late_to_while_no_clock_was_read(clocks):
    """The more there are, the longer clocks are read before that is so again."""
    found = clocks(2)
    found.words[threads._NEEDED] = threads._FEW

    def run(well):
        """So many loops that go well, and one that does not"""
        for _ in range(well):
            found.nanoseconds[openmp.WALL] += 800
            assert found.loop()
        assert found.loop(late=True)
        return found.words[threads._NEEDED]

    few = threads._FEW
    assert run(few - 1) == few  # clocks were read
    assert run(few + 1) == 8 * few
    assert run(8 * few - 1) == 8 * few
    assert run(8 * few) == threads._MANY
    assert run(threads._PAID - 1) == threads._MANY
    assert run(threads._PAID) == few


@pytest.mark.parametrize("comes", ["at once", "in a moment", "late"])
def test_whether_somebody_was_late(team, monkeypatch, comes):
    """Who has not come some time after the owner finds no piece left."""
    looks = []

    def choose(model, ready):
        theirs = [task for task in ready if task in model.theirs]
        others = [task for task in ready if task not in theirs]
        first = comes == "at once" or (comes == "in a moment" and looks)
        return ((theirs or others) if first else (others or theirs))[0]

    model = team(2, choose)
    monkeypatch.setattr(threads, "_look_away", lambda: looks.append(1))
    model.words.poke(threads._LOOKS, 3 * threads._GRACE)
    with_theirs(model, 2)
    model.owner((8, 1, MUCH, 1))
    model.run()
    assert len(looks) >= {"at once": 0, "in a moment": 1, "late": 3}[comes]
    assert model.words.peek(threads._DOUBT) == threads._DOUBTFUL * (comes == "late")
    assert model.words.peek(threads._WELL) == (comes != "late")


def test_a_mode_that_must_stay_with_its_thread(team):
    model = team(3, lambda model, ready: ready[-1])
    model.owner((8, 1, MUCH, -1), (8, 1, 0, -1))
    model.run()
    assert model.words.peek(threads._LOOPS) == 0


@pytest.mark.parametrize("seed", range(8))
def test_random_schedules_of_many(team, seed):
    """Three members, and up to three threads that bring loops at the same time."""
    rng = random.Random(seed)

    def choose(model, ready):
        return ready[0] if rng.random() < calm else rng.choice(ready)

    for _ in range(200):
        calm = rng.choice((0, 0.5, 0.9, 0.98))
        model = team(rng.choice((2, 3)), choose)
        model.words.poke(threads._THEIRS, rng.choice((0, 2, 3)))
        model.awake = lambda: rng.random() < 0.5
        for _ in range(rng.randint(1, 3)):
            sizes = [rng.randint(0, 14) for _ in range(rng.randint(1, 4))]
            model.owner(
                *(
                    (
                        size,
                        rng.randint(1, 3),
                        rng.choice((MUCH, LITTLE, 3 * LITTLE, 0)),
                        rng.choice((0, 0, 1, 1, 2, -1)),
                    )
                    for size in sizes
                )
            )
        model.run()


@pytest.mark.parametrize("members", [16, 64, 256])
def test_a_large_team(team, members):
    """As on machines with so many processors."""
    rng = random.Random(members)
    calm = 1 - 1 / members
    choose = lambda model, ready: ready[0] if rng.random() < calm else rng.choice(ready)
    model = team(members, choose)
    for _ in range(2):
        model.owner((3 * members + 1, 1, members * threads.SHARE + MUCH, 1))
    model.run()
    assert model.workers & {*model.members}


@pytest.mark.parametrize("shares", [2, 16, 24, 63, 64, 1000])
def test_pieces_are_of_two_shares_where_that_is_many(team, shares):
    model = team(2, lambda model, ready: ready[-1])
    model.owner((320, 1, shares * threads.SHARE, 1))
    model.run()
    pieces = min(max(shares // 2, 8), 32)
    assert model.words.peek(threads._PIECE) == -(-320 // (pieces // 2 * 2))


def test_no_more_are_woken_than_there_is_work_for(team, monkeypatch):
    """Each is woken by whoever brings the loop: 255 would take longer than most loops."""
    woken = []

    def choose(model, ready):
        members = [task for task in ready if task in model.members]
        return (members or ready)[0]  # whoever is woken does it all at once

    model = team(8, choose)
    monkeypatch.setattr(
        threads, "_wake", lambda lock: (woken.append(lock), model.wake(lock))
    )
    model.owner((8, 1, MUCH, 1))
    model.run()
    assert len(woken) == 1


def test_a_look_in_vain(monkeypatch):
    """It is as long as that of a member, who waits for a loop after those it saw."""
    interpret(monkeypatch)
    words, looks = [0] * threads._MEMBER, []
    monkeypatch.setattr(threads, "_team", lambda: words)
    monkeypatch.setattr(threads, "_load", lambda words, i: words[i])
    monkeypatch.setattr(threads, "_look_away", lambda: looks.append(1))
    threads._look_in_vain(7)
    assert len(looks) == 7


@pytest.mark.parametrize(
    ("seconds", "looks"), [(1e-3, 100), (100e-6, 750), (20e-6, 3750), (0, 75_000)]
)
def test_how_often_one_looks_for_work(monkeypatch, seconds, looks):
    """As often as a moment allows, by the quickest of three tries."""
    now = iter((0, 5 * seconds, 10, 10 + seconds, 20, 20 + 2 * seconds))
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(threads, "_PATIENCE", 75e-6)
    assert threads._count_looks(lambda number: None) == pytest.approx(looks, abs=1)


def test_a_limit_is_kept(team):
    model = team(3, lambda model, ready: ready[-1])
    model.words.poke(threads._LIMIT, 1)
    model.limit = 1
    model.owner((8, 1, MUCH, 0))
    model.run()
    assert model.words.peek(threads._LOOPS) == 0


def test_a_thread_whose_loops_stay_with_it(team):
    model = team(3, lambda model, ready: ready[-1])
    model.owner((8, 1, MUCH, 0)).alone = 1
    model.run()
    assert model.words.peek(threads._LOOPS) == 0


def test_wakings_that_do_not_pay_become_rare(monkeypatch):
    interpret(monkeypatch)
    words, alone = [0] * 64, [0]
    while len(alone) < 9:
        if threads._may_wake(words, 1):
            alone.append(0)
        else:
            alone[-1] += 1
    assert alone[:8] == [0, 1, 3, 7, 15, 31, 63, 63]
    for _ in range(threads._SOON):
        assert not threads._may_wake(words, 0)
    while not threads._may_wake(words, 1):
        pass
    assert threads._may_wake(words, 1)  # it paid


class Places:
    """Of 128 processors, those that the main thread and a member may use."""

    def __init__(self, monkeypatch):
        self.words = words = [0] * (threads._MEMBER + 2 * threads._MEMBER_SIZE)
        self.member = threads._MEMBER + threads._MEMBER_SIZE
        self.main, self.allowed = {*range(128)}, {*range(128)}
        self.here, self.fails, self.calls = 0, "", []
        words[threads._GET_PLACES], words[threads._SET_PLACES] = "get", "set"
        words[threads._PROCESS], words[self.member + threads._ID] = "main", "member"
        words[self.member + threads._FORBIDDEN] = -1
        monkeypatch.setattr(threads, "_call_loop", self.call)
        monkeypatch.setattr(threads, "_call_int", lambda *_: self.here)
        monkeypatch.setattr(threads, "_address", lambda words, i: i)

    def call(self, function, arguments):
        thread, size, mask = arguments
        assert size == 8 * threads._PLACES
        mask = slice(mask, mask + threads._PLACES)
        self.calls.append(f"{function} {thread}")
        if self.fails == self.calls[-1]:
            return -1
        if function == "get":
            places = self.main if thread == "main" else self.allowed
        else:
            assert thread == "member"
            words = self.words[mask]
            places = {p for p in range(128) if words[p // 64] >> p % 64 & 1}
            if not places:
                return -1
            self.allowed = places
        bits = sum(1 << place for place in places)
        # The words have signs, and Python's numbers have more than 64 bits.
        words = np.frombuffer(bits.to_bytes(size, "little"), np.int64)
        self.words[mask] = words.tolist()
        return 8 if function == "get" else 0

    @property
    def forbidden(self):
        return self.words[self.member + threads._FORBIDDEN]

    def wake(self, here):
        """Bring a loop on a processor; return those that the member may use then."""
        self.here = here
        del self.calls[:]
        threads._keep_away(self.words, 1)
        return self.allowed


@pytest.fixture
def places(monkeypatch):
    interpret(monkeypatch)
    return Places(monkeypatch)


def test_a_member_keeps_off_the_owners_processor(places):
    every = {*range(128)}
    for here in (3, 70, 127, 63, 0):
        assert places.wake(here) == every - {here}
        assert places.forbidden == here
    places.wake(0)  # where it keeps off already,
    assert places.calls == []
    for here in (64 * threads._PLACES, -1):  # and where there is no bit for it
        places.wake(here)
        assert places.calls == []
    for places.fails in ("get member", "get main", "set member"):
        assert places.wake(5) == every - {0}
        assert places.forbidden == 0
        assert places.calls[-1] == places.fails
    places.fails = ""
    assert places.wake(5) == every - {5}


def test_what_an_administrator_changes_stays_changed(places):
    every = {*range(128)}
    assert places.wake(1) == every - {1}
    # The whole process is narrowed, by `taskset -ap`.
    places.main, places.allowed = {2, 3, 70}, {2, 3, 70}
    assert places.wake(2) == {3, 70}
    assert places.wake(3) == {2, 70}
    # To one processor; there is no other for the member.
    places.main, places.allowed = {2}, {2}
    assert places.wake(2) == {2}
    assert places.forbidden == -1
    # To two, and then to the very processor that the member has.
    places.main, places.allowed = {2, 3}, {2, 3}
    assert places.wake(2) == {3}
    places.main = {3}
    assert places.wake(3) == {3}
    assert places.forbidden == 2
    # To two again, for all but the member: only now may it go back.
    places.main = {2, 3}
    assert places.wake(3) == {2}
    # The member alone; what it was forbidden before is not put back.
    places.allowed = {3, 4}
    assert places.wake(4) == {3}
    # To all.
    places.main, places.allowed = every, every
    assert places.wake(5) == every - {5}
    assert places.wake(6) == every - {6}


def test_where_the_main_thread_is_bound(places):
    """Its own processor is no reason to take the others from a member one by one."""
    every = {*range(128)}
    assert places.wake(1) == every - {1}
    places.main = {0}
    for here in (2, 3, 0, 4):
        assert places.wake(here) == every - {1}


# The model finds what it is made for --------------------------------------------------


def test_a_piece_that_two_take_is_found(team, monkeypatch):
    def make(choose):
        model = team(2, choose)
        model.owner((2, 1, MUCH, 0))

        def swap(words, i, old, new):
            """Not in one step."""
            same = model.load(words, i) == old
            if same:
                model.store(words, i, new)
            return same

        monkeypatch.setattr(threads, "_swap", swap)
        return model

    with pytest.raises(AssertionError):
        every_schedule(make)


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_only_so_many_have_a_part(team, limit):
    """The others leave the loop alone, though they see it."""
    rng, workers = random.Random(limit), set()
    for _ in range(50):
        model = team(4, lambda model, ready: rng.choice(ready))
        model.words.poke(threads._LIMIT, 1)
        model.limit = limit
        for _ in range(2):
            model.owner((12, 1, MUCH, 0), (12, 1, MUCH, 1))
        model.run()
        workers |= {model.members.index(t) for t in model.workers - {*model.owners}}
    assert workers == set(range(limit - 1))
