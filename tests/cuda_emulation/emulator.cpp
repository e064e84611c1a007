#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "fiber.h"

namespace emulator {

namespace {

constexpr size_t kStackBytes = 128 * 1024;

struct Warp {
  uint64_t slot[2][32];
  int line[2];
  unsigned arrived = 0;
  uint64_t generation = 0;  // exchanges completed
  unsigned live = 0;
};

struct Cluster {
  unsigned size;
  unsigned live = 0;
  unsigned pending = 0;  // live threads that have not arrived in this phase
  uint64_t phase = 0;    // phases completed
};

struct PendingCopy {
  void* to;
  const void* from;
  int group;
};

}  // namespace

struct Block {
  uint3 index;
  const Launch* launch;
  dim3 size;
  Cluster* cluster;
  unsigned rank;
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, free};
  std::vector<Block>* peers;
  std::vector<Warp> warps;
  unsigned live = 0;
  unsigned arrived = 0;
  int line = 0;
  uint64_t generation = 0;
};

namespace {

struct Fiber : Thread {
  Context context;
  // The counter this fiber waits on, and the value it must pass; null = ready.
  const uint64_t* waits_on = nullptr;
  uint64_t waits_past = 0;
  int wait_line = 0;
  bool finished = false;
  bool arrived_in_cluster = false;
  uint64_t cluster_phase = 0;
  int copy_group = 0;
  std::vector<PendingCopy> copies;
};

Context g_scheduler;
Fiber* g_current = nullptr;
const std::function<void()>* g_body = nullptr;
std::mt19937_64 g_random;
int64_t g_launches = 0;
Launch g_last_launch;

[[noreturn]] void fail(const char* what, int line) {
  const Fiber* f = g_current;
  fprintf(stderr, "cuda emulator: %s (line %d", what, line);
  if (f) fprintf(stderr, ", block %u %u, thread %u", f->block->index.x, f->block->index.y, f->thread_index.x);
  fprintf(stderr, ")\n");
  abort();
}

Warp& warp_of(const Fiber& f) { return f.block->warps[f.thread_index.x / 32]; }

void wait_past(const uint64_t* counter, uint64_t value, int line) {
  Fiber* f = g_current;
  if (*counter > value) return;
  f->waits_on = counter;
  f->waits_past = value;
  f->wait_line = line;
  switch_fiber(&f->context, &g_scheduler, false);
}

void finish_cluster_phase(Cluster* cluster) {
  if (cluster->pending == 0) {
    cluster->phase += 1;
    cluster->pending = cluster->live;
  }
}

void leave(Fiber* f) {
  Cluster* cluster = f->block->cluster;
  if (f->block->arrived > 0) fail("a thread ended while others wait at a barrier of its block", f->block->line);
  if (warp_of(*f).arrived != 0) fail("a thread ended while its warp waits for it", warp_of(*f).line[0]);
  if (!f->copies.empty()) fail("a thread ended with asynchronous copies under way", 0);
  f->block->live -= 1;
  warp_of(*f).live -= 1;
  cluster->live -= 1;
  // A thread counts as arrived for good once it has ended.
  const bool arrived = f->arrived_in_cluster && f->cluster_phase == cluster->phase;
  if (!arrived) cluster->pending -= 1;
  if (cluster->live > 0) finish_cluster_phase(cluster);
  if (f->block->live == 0) memset(f->block->shared.get(), 0xdb, f->block->launch->shared_bytes);
  f->finished = true;
}

void fiber_main() {
  enter_fiber();
  (*g_body)();
  Fiber* f = g_current;
  leave(f);
  switch_fiber(&f->context, &g_scheduler, true);
  abort();
}

// Stacks are kept from launch to launch.
void* stack_of(size_t index) {
  static std::vector<void*> stacks;
  while (stacks.size() <= index) {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("no memory for stacks", 0);
    stacks.push_back(p);
  }
  return stacks[index];
}

void reorder(std::vector<Fiber*>* fibers) {
  if (settings().order == Settings::Order::kRandom) std::shuffle(fibers->begin(), fibers->end(), g_random);
}

void run_cluster(const Launch& launch, unsigned first_x, unsigned y) {
  Cluster cluster;
  cluster.size = launch.cluster;
  std::vector<Block> blocks(launch.cluster);
  std::vector<Fiber> fibers(static_cast<size_t>(launch.cluster) * launch.threads);
  std::vector<Fiber*> order;
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    Block& block = blocks[rank];
    block.index = uint3{first_x + rank, y, 0};
    block.launch = &launch;
    block.size = dim3{launch.threads, 1, 1};
    block.cluster = &cluster;
    block.rank = rank;
    block.peers = &blocks;
    block.warps.resize((launch.threads + 31) / 32);
    void* storage = nullptr;
    if (posix_memalign(&storage, 128, launch.shared_bytes ? launch.shared_bytes : 1)) fail("no memory", 0);
    memset(storage, 0xff, launch.shared_bytes);  // NaN as floats
    block.shared.reset(static_cast<unsigned char*>(storage));
    block.live = launch.threads;
    for (unsigned t = 0; t < launch.threads; ++t) {
      Fiber& f = fibers[static_cast<size_t>(rank) * launch.threads + t];
      f.thread_index = uint3{t, 0, 0};
      f.block = &block;
      block.warps[t / 32].live += 1;
      make_fiber(&f.context, stack_of(order.size()), kStackBytes, fiber_main);
      order.push_back(&f);
    }
  }
  cluster.live = cluster.pending = static_cast<unsigned>(fibers.size());
  if (settings().order == Settings::Order::kBackward) std::reverse(order.begin(), order.end());
  size_t left = order.size();
  while (left > 0) {
    reorder(&order);
    bool progress = false;
    for (Fiber* f : order) {
      if (f->finished || (f->waits_on && *f->waits_on <= f->waits_past)) continue;
      progress = true;
      f->waits_on = nullptr;
      g_current = f;
      switch_fiber(&g_scheduler, &f->context, false);
      if (f->finished) left -= 1;
    }
    if (!progress) {
      for (Fiber* f : order) {
        if (f->finished) continue;
        g_current = f;
        fail("deadlock: not every thread reaches this barrier", f->wait_line);
      }
    }
  }
  g_current = nullptr;
}

}  // namespace

const uint3& Thread::block_index() const { return block->index; }
const dim3& Thread::block_size() const { return block->size; }
const dim3& Thread::grid_size() const { return block->launch->grid; }

Settings& settings() {
  static Settings value;
  return value;
}

int64_t launches() { return g_launches; }
const Launch& last_launch() { return g_last_launch; }

void run(const Launch& launch, const std::function<void()>& body) {
  ++g_launches;
  g_last_launch = launch;
  g_body = &body;
  g_random.seed(settings().order_seed);
  std::vector<std::pair<unsigned, unsigned>> clusters;
  for (unsigned y = 0; y < launch.grid.y; ++y)
    for (unsigned x = 0; x < launch.grid.x; x += launch.cluster) clusters.emplace_back(x, y);
  if (settings().order == Settings::Order::kBackward) std::reverse(clusters.begin(), clusters.end());
  if (settings().order == Settings::Order::kRandom) std::shuffle(clusters.begin(), clusters.end(), g_random);
  for (const auto& at : clusters) run_cluster(launch, at.first, at.second);
}

Thread& self() { return *g_current; }

void yield() {
  if (settings().order != Settings::Order::kRandom || (g_random() & 1)) return;
  switch_fiber(&g_current->context, &g_scheduler, false);
}

void block_barrier(int line) {
  Block* block = g_current->block;
  if (block->live != block->launch->threads) fail("a barrier after some threads of the block have ended", line);
  if (block->arrived > 0 && block->line != line) fail("threads of a block wait at different barriers", line);
  block->line = line;
  const uint64_t generation = block->generation;
  if (++block->arrived == block->live) {
    block->arrived = 0;
    block->generation += 1;
    return;
  }
  wait_past(&block->generation, generation, line);
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, int line) {
  Fiber* f = g_current;
  Warp& warp = warp_of(*f);
  if (mask != 0xffffffffu || warp.live != 32) fail("a warp operation without the whole warp", line);
  // Two sets of slots: nobody can be two exchanges ahead of a lane that has not read yet.
  const uint64_t generation = warp.generation;
  const int set = static_cast<int>(generation & 1);
  if (warp.arrived != 0 && warp.line[set] != line) fail("lanes of a warp are in different operations", line);
  warp.line[set] = line;
  warp.slot[set][f->lane()] = value;
  warp.arrived |= 1u << f->lane();
  if (warp.arrived == 0xffffffffu) {
    warp.arrived = 0;
    warp.generation += 1;
  } else {
    wait_past(&warp.generation, generation, line);
  }
  return warp.slot[set][lane];
}

void warp_barrier(int line) { exchange(0xffffffffu, 0, 0, line); }

unsigned char* shared_memory() { return g_current->block->shared.get(); }

unsigned cluster_rank() { return g_current->block->rank; }

void cluster_arrive() {
  Fiber* f = g_current;
  Cluster* cluster = f->block->cluster;
  if (f->arrived_in_cluster) fail("cluster_arrive twice without cluster_wait", 0);
  f->arrived_in_cluster = true;
  f->cluster_phase = cluster->phase;
  cluster->pending -= 1;
  finish_cluster_phase(cluster);
}

void cluster_wait() {
  Fiber* f = g_current;
  if (!f->arrived_in_cluster) fail("cluster_wait without cluster_arrive", 0);
  f->arrived_in_cluster = false;
  wait_past(&f->block->cluster->phase, f->cluster_phase, 0);
}

void* cluster_map(void* p, unsigned rank) {
  Block* block = g_current->block;
  if (rank >= block->cluster->size) fail("no such rank in the cluster", 0);
  const ptrdiff_t offset = static_cast<unsigned char*>(p) - block->shared.get();
  if (offset < 0 || static_cast<size_t>(offset) >= block->launch->shared_bytes)
    fail("only shared memory can be mapped", 0);
  Block& peer = (*block->peers)[rank];
  if (&peer != block) {
    if (block->cluster->phase == 0) fail("a peer's shared memory before the cluster's first barrier", 0);
    if (peer.live == 0) fail("shared memory of a block that has ended", 0);
  }
  return peer.shared.get() + offset;
}

void copy_async(void* to, const void* from) {
  g_current->copies.push_back(PendingCopy{to, from, g_current->copy_group});
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("misaligned copy", 0);
}

void commit_copies() { g_current->copy_group += 1; }

void wait_copies(int newest) {
  Fiber* f = g_current;
  const int last = f->copy_group - newest;  // groups before this one must have landed
  auto landed = [last](const PendingCopy& c) { return c.group < last; };
  for (const PendingCopy& c : f->copies)
    if (landed(c)) memcpy(c.to, c.from, 16);
  f->copies.erase(std::remove_if(f->copies.begin(), f->copies.end(), landed), f->copies.end());
}

}  // namespace emulator
