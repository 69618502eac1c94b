// Tests of the parts of the decoder that need no video: sampling plans, views, packet inspection, packet index.
// Prints each failed expectation with its line; the exit status is 1 if there is one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "bitstream.h"
#include "packet_index.h"
#include "sampling.h"

namespace {

using namespace pyvdl;
using Frames = std::vector<int64_t>;

int failures = 0;

template <typename T>
std::string text(const T& value) {
  std::ostringstream out;
  if constexpr (requires { value.begin(); } && !std::is_same_v<T, std::string>) {
    for (const auto& item : value) out << item << ' ';
  } else {
    out << value;
  }
  return out.str();
}

template <typename A, typename B>
void expect_equal(const A& got, const B& wanted, int line) {
  if (got == static_cast<A>(wanted)) return;
  ++failures;
  std::printf("test_core.cpp:%d: got %s, wanted %s\n", line, text(got).c_str(), text(static_cast<A>(wanted)).c_str());
}

void expect(bool holds, const char* what, int line) {
  if (holds) return;
  ++failures;
  std::printf("test_core.cpp:%d: does not hold: %s\n", line, what);
}

template <typename Call>
void expect_refused(Call call, const std::string& words, int line) {
  try {
    call();
  } catch (const SamplingError& error) {
    if (std::string(error.what()).find(words) != std::string::npos) return;
    std::printf("test_core.cpp:%d: '%s' does not say '%s'\n", line, error.what(), words.c_str());
    ++failures;
    return;
  }
  ++failures;
  std::printf("test_core.cpp:%d: not refused\n", line);
}

// num_frames frames at a constant rate; every tenth is a key frame.
Timeline steady(int num_frames, double fps) {
  Timeline timeline;
  for (int i = 0; i < num_frames; ++i) {
    timeline.starts.push_back(i / fps);
    if (i % 10 == 0) timeline.key_frames.push_back(i);
  }
  timeline.end = num_frames / fps;
  return timeline;
}

FramePlan plan_of(Sampling sampling, int num_frames) {
  FramePlan plan;
  plan.sampling = sampling;
  plan.num_frames = num_frames;
  return plan;
}

void test_frame_played_at_an_instant() {
  const Timeline timeline{{0, 0.5, 2.0}, 3.0, {0}};
  expect_equal(timeline.at(0), 0, __LINE__);
  expect_equal(timeline.at(0.499), 0, __LINE__);
  expect_equal(timeline.at(0.5), 1, __LINE__);
  expect_equal(timeline.at(1.99), 1, __LINE__);
  expect_equal(timeline.at(2.9), 2, __LINE__);
}

void test_uniform_takes_centres_of_segments() {
  const Timeline timeline = steady(40, 10);
  FramePlan plan = plan_of(Sampling::uniform, 4);
  expect_equal(plan_frames(timeline, plan), Frames{5, 15, 25, 35}, __LINE__);
  plan.start_seconds = 1;
  plan.end_seconds = 2;
  expect_equal(plan_frames(timeline, plan), Frames{11, 13, 16, 18}, __LINE__);
  plan.end_seconds = 99;  // cut at the end of the video
  plan.num_frames = 3;
  expect_equal(plan_frames(timeline, plan), Frames{15, 25, 35}, __LINE__);
  plan.num_frames = 80;
  plan.start_seconds = 0;
  const Frames frames = plan_frames(timeline, plan);
  expect_equal(frames.size(), 80, __LINE__);
  expect(frames.front() == 0 && frames.back() == 39 && std::is_sorted(frames.begin(), frames.end()), "repeats in order",
         __LINE__);
}

void test_uniform_of_one_frame_takes_the_middle() {
  expect_equal(plan_frames(steady(41, 10), plan_of(Sampling::uniform, 1)), Frames{20}, __LINE__);
}

void test_fps_steps_from_the_start() {
  const Timeline timeline = steady(100, 30);
  FramePlan plan = plan_of(Sampling::fps, 6);
  plan.fps = 2;
  expect_equal(plan_frames(timeline, plan), Frames{0, 15, 30, 45, 60, 75}, __LINE__);
  plan.start_seconds = 0.1;  // 0.1 + k/2 falls exactly on frames
  expect_equal(plan_frames(timeline, plan), Frames{3, 18, 33, 48, 63, 78}, __LINE__);
  plan.fps = 3;
  plan.start_seconds = 0;
  expect_equal(plan_frames(timeline, plan), Frames{0, 10, 20, 30, 40, 50}, __LINE__);
}

void test_short_clips() {
  const Timeline timeline = steady(20, 10);
  FramePlan plan = plan_of(Sampling::fps, 7);
  plan.end_seconds = 1.5;  // instants 0, 0.5, 1.0
  expect_equal(plan_frames(timeline, plan), Frames{0, 5, 10, 10, 10, 10, 10}, __LINE__);
  plan.short_clip = ShortClip::loop;
  expect_equal(plan_frames(timeline, plan), Frames{0, 5, 10, 0, 5, 10, 0}, __LINE__);
  plan.short_clip = ShortClip::error;
  expect_refused([&] { plan_frames(timeline, plan); }, "3 instants at 2 frames a second, 7 wanted", __LINE__);
  plan.end_seconds = 3.01;  // the video ends at 2 s
  expect_refused([&] { plan_frames(timeline, plan); }, "4 instants", __LINE__);
  plan.sampling = Sampling::uniform;
  plan.end_seconds = 0.6;
  expect_refused([&] { plan_frames(timeline, plan); }, "shows 6 frames, 7 wanted", __LINE__);
  plan.num_frames = 6;
  expect_equal(plan_frames(timeline, plan), Frames{0, 1, 2, 3, 4, 5}, __LINE__);
}

void test_windows_outside_the_video_are_refused() {
  FramePlan plan = plan_of(Sampling::uniform, 2);
  plan.start_seconds = 4;
  expect_refused([&] { plan_frames(steady(40, 10), plan); }, "outside the video's [0, 4) s", __LINE__);
  expect_refused([&] { plan_frames(Timeline{}, plan); }, "no frame", __LINE__);
}

void test_random_takes_one_instant_in_each_segment() {
  const Timeline timeline = steady(800, 100);
  FramePlan plan = plan_of(Sampling::random, 8);
  std::vector<int> histogram(10);
  for (uint64_t seed = 0; seed < 500; ++seed) {
    plan.seed = seed;
    const Frames frames = plan_frames(timeline, plan);
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t frame = frames[static_cast<size_t>(i)];
      expect(frame >= 100 * i && frame < 100 * (i + 1), "the instant lies in its segment", __LINE__);
      ++histogram[static_cast<size_t>(frame % 100 / 10)];
    }
  }
  for (const int count : histogram) expect(std::abs(count - 400) < 100, "instants spread over the segment", __LINE__);
  plan.seed = 7;
  const Frames first = plan_frames(timeline, plan);
  expect_equal(plan_frames(timeline, plan), first, __LINE__);
  plan.seed = 8;
  expect(plan_frames(timeline, plan) != first, "another seed, other instants", __LINE__);
}

void test_random_numbers_are_splitmix64() {
  // The reference sequence of seed 1234567 (Vigna, splitmix64.c); stream 0 leaves the seed as it is, and one number is
  // drawn at the start.
  Random random(1234567, 0);
  expect_equal(random.next(), 3203168211198807973ULL, __LINE__);
  expect_equal(random.next(), 9817491932198370423ULL, __LINE__);
}

void test_keyframes() {
  const Timeline timeline = steady(40, 10);
  expect_equal(plan_frames(timeline, plan_of(Sampling::keyframe, 8)), Frames{0, 0, 10, 10, 20, 20, 30, 30}, __LINE__);
  Timeline late = timeline;
  late.key_frames = {30};
  expect_refused([&] { plan_frames(late, plan_of(Sampling::keyframe, 2)); }, "no key frame at or before 1 s", __LINE__);
}

void test_views() {
  ViewPlan plan;
  plan.short_side = 100;
  plan.size = 80;
  const View view = plan_view(320, 200, plan);
  expect(view == View{160, 100, 40, 10, 80, 80, false}, "centre crop of a wide picture", __LINE__);
  expect(plan_view(200, 320, plan) == View{100, 160, 10, 40, 80, 80, false}, "and of a high one", __LINE__);
  plan.crop = Crop::fixed;
  plan.rectangle = {5, 7, 90, 30};
  expect(plan_view(320, 200, plan) == View{160, 100, 7, 5, 30, 90, false}, "a rectangle is (y, x, h, w)", __LINE__);
  plan.rectangle = {11, 0, 90, 30};
  expect_refused([&] { plan_view(320, 200, plan); }, "does not fit into the resized picture of height 100", __LINE__);
}

void test_random_views() {
  ViewPlan plan;
  plan.short_side = 100;
  plan.size = 96;
  plan.crop = Crop::random;
  plan.flip = true;
  plan.scale_jitter = {0.8, 1.25};
  int mirrored = 0, low_x = 0, high_x = 0, low_y = 0, high_y = 0;
  bool independent = false;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    plan.seed = seed;
    const View view = plan_view(200, 100, plan);
    expect(view.resized_height >= 96 && view.resized_height <= 125, "height jitter, at least the crop", __LINE__);
    expect(view.resized_width >= 160 && view.resized_width <= 250, "width jitter", __LINE__);
    expect(view.x >= 0 && view.x + 96 <= view.resized_width, "x inside", __LINE__);
    expect(view.y >= 0 && view.y + 96 <= view.resized_height, "y inside", __LINE__);
    const int free_x = view.resized_width - 96, free_y = view.resized_height - 96;
    low_x += 4 * view.x < free_x, high_x += 4 * view.x > 3 * free_x;
    low_y += 4 * view.y < free_y, high_y += 4 * view.y > 3 * free_y;
    independent |= std::abs(view.resized_width - 2 * view.resized_height) > 40;
    mirrored += view.mirrored;
    expect(plan_view(200, 100, plan) == view, "the seed decides", __LINE__);
  }
  expect(independent, "height and width are scaled by independent factors", __LINE__);
  expect(mirrored > 150 && mirrored < 250, "about half are mirrored", __LINE__);
  for (const int count : {low_x, high_x, low_y, high_y}) {
    expect(count > 60 && count < 140, "about a quarter are cut from each edge", __LINE__);
  }
}

// --- packets ---

std::vector<uint8_t> nal(std::initializer_list<int> bytes) {
  std::vector<uint8_t> result{0, 0, 0, static_cast<uint8_t>(bytes.size())};
  for (const int byte : bytes) result.push_back(static_cast<uint8_t>(byte));
  return result;
}

std::vector<uint8_t> join(std::initializer_list<std::vector<uint8_t>> parts) {
  std::vector<uint8_t> result;
  for (const auto& part : parts) result.insert(result.end(), part.begin(), part.end());
  return result;
}

void test_h264_packets() {
  const std::vector<uint8_t> avcc{1, 100, 0, 30, 0xFF, 0xE1, 0, 0};  // length prefixes of 4 bytes
  const PacketInspector inspector(AV_CODEC_ID_H264, avcc);
  const PacketFacts idr = inspector.inspect(join({nal({0x67, 1}), nal({0x65, 2})}));
  expect(idr.picture && idr.entry == Entry::clean && !idr.disposable && !idr.damaged, "IDR", __LINE__);
  const PacketFacts b = inspector.inspect(join({nal({0x09, 0x30}), nal({0x01, 9, 9})}));
  expect(b.picture && b.disposable && b.entry == Entry::none, "a picture nothing refers to", __LINE__);
  expect(!inspector.inspect(nal({0x41, 9})).disposable, "a reference picture", __LINE__);
  expect(!inspector.inspect(join({nal({0x68, 1}), nal({0x01, 9})})).disposable, "parameter sets are kept", __LINE__);
  const PacketFacts open = inspector.inspect(join({nal({0x06, 6, 1, 0x84, 0x80}), nal({0x41, 9})}));
  expect(open.entry == Entry::open, "a recovery point that takes effect at once", __LINE__);
  const PacketFacts slow = inspector.inspect(join({nal({0x06, 6, 1, 0x24, 0x80}), nal({0x41, 9})}));
  expect(slow.entry == Entry::none, "a recovery point that takes effect later", __LINE__);
  const PacketFacts cut = inspector.inspect({{0, 0, 0, 9, 0x41, 1}});
  expect(cut.damaged && !cut.picture, "a length that runs over the end", __LINE__);
  expect(!inspector.inspect(nal({0x06, 5, 1, 0, 0x80})).picture, "a packet without a picture", __LINE__);

  const PacketInspector start_codes(AV_CODEC_ID_H264, {});
  const std::vector<uint8_t> stream{0, 0, 0, 1, 0x09, 0x10, 0, 0, 1, 0x65, 1, 2};
  expect(start_codes.inspect(stream).entry == Entry::clean, "IDR behind start codes", __LINE__);
}

void test_hevc_packets() {
  const PacketInspector inspector(AV_CODEC_ID_HEVC, {});
  const auto packet = [&](int type, int layer) {
    const std::vector<uint8_t> bytes{0, 0, 1, static_cast<uint8_t>(type << 1), static_cast<uint8_t>(layer + 1), 0x80};
    return inspector.inspect(bytes);
  };
  expect(packet(19, 0).entry == Entry::clean && packet(21, 0).entry == Entry::open, "IDR and CRA", __LINE__);
  expect(packet(1, 0).entry == Entry::none && !packet(1, 0).disposable, "TRAIL_R", __LINE__);
  expect(packet(0, 1).disposable && packet(0, 1).temporal_layer == 1, "TRAIL_N", __LINE__);
  expect(!packet(33, 0).picture, "SPS", __LINE__);
}

void test_other_packets() {
  const std::vector<uint8_t> b{0, 0, 1, 0xB6, 0x90, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const std::vector<uint8_t> p{0, 0, 1, 0xB6, 0x50, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const PacketInspector mpeg4(AV_CODEC_ID_MPEG4, {});
  expect(mpeg4.inspect(b).backward && mpeg4.inspect(b).disposable, "B", __LINE__);
  expect(!mpeg4.inspect(p).backward && !mpeg4.inspect(p).packed && !mpeg4.inspect(p).doubtful, "P", __LINE__);
  expect(mpeg4.inspect(join({p, b})).packed, "two pictures in a packet", __LINE__);
  expect(mpeg4.inspect({{0, 0, 1, 0xB6, 0x51, 0xCF}}).doubtful, "maybe a place marker", __LINE__);
  const PacketInspector vp8(AV_CODEC_ID_VP8, {});
  expect(vp8.inspect({{0x10, 0, 0}}).hidden == false && vp8.inspect({{0x00, 0, 0}}).hidden, "VP8 hidden", __LINE__);
  const PacketInspector vp9(AV_CODEC_ID_VP9, {});
  expect(!vp9.inspect({{0x82, 0, 0}}).hidden && vp9.inspect({{0x80, 0, 0}}).hidden, "VP9 hidden", __LINE__);
}

// Packets from "type pts" pairs in decoding order. I: clean entry, K: open entry, P: reference, B: disposable, D: cut.
PacketIndex index_of(const std::vector<std::pair<char, int64_t>>& stream) {
  std::vector<IndexEntry> packets;
  for (const auto& [type, pts] : stream) {
    IndexEntry entry;
    entry.pts = pts;
    entry.dts = static_cast<int64_t>(packets.size());
    entry.position_bytes = 100 * static_cast<int64_t>(packets.size());
    entry.size_bytes = 50;
    entry.duration = 1;
    entry.key = type == 'I' || type == 'K';
    entry.facts.entry = type == 'I' ? Entry::clean : type == 'K' ? Entry::open : Entry::none;
    entry.facts.disposable = entry.facts.backward = type == 'B';
    entry.discarded = type == 'D';
    packets.push_back(entry);
  }
  return PacketIndex(std::move(packets), {1, 10}, 1);
}

void test_index_orders_by_pts() {
  const PacketIndex index = index_of({{'I', 0}, {'P', 3}, {'B', 1}, {'B', 2}, {'P', 6}, {'B', 4}, {'B', 5}});
  expect(index.complete(), "complete", __LINE__);
  Frames ordinals;
  for (int64_t rank = 0; rank < index.num_frames(); ++rank) ordinals.push_back(index.ordinal(rank));
  expect_equal(ordinals, Frames{0, 2, 3, 1, 5, 6, 4}, __LINE__);
  expect_equal(index.rank(1), 3, __LINE__);
  expect_equal(index.reorder_depth(), 1, __LINE__);
  expect_equal(index.timeline().end, 0.7, __LINE__);
  expect_equal(index.locate(300, 50), 3, __LINE__);
  expect_equal(index.locate(300, 51), -1, __LINE__);
  expect_equal(index.locate(301, 50), -1, __LINE__);
}

void test_index_of_a_pyramid() {
  const PacketIndex index = index_of({{'I', 0}, {'P', 4}, {'P', 2}, {'B', 1}, {'B', 3}});
  expect_equal(index.reorder_depth(), 2, __LINE__);
}

void test_index_leaves_out_what_an_edit_list_cuts() {
  const PacketIndex index = index_of({{'D', -2}, {'I', 0}, {'P', 1}, {'P', 4}});
  expect_equal(index.num_frames(), 3, __LINE__);
  expect_equal(index.rank(0), -1, __LINE__);
  expect_equal(index.pts(), Frames{0, 1, 4}, __LINE__);
  expect_equal(index.durations_seconds(), std::vector<double>{0.1, 0.3, 0.1}, __LINE__);
}

void test_index_start_of_decoding() {
  // An open group: the B pictures after K are shown before it and need the group before.
  const PacketIndex index = index_of({{'I', 0}, {'P', 1}, {'K', 4}, {'B', 2}, {'B', 3}, {'P', 5}, {'I', 6}, {'P', 7}});
  Frames starts;
  for (int64_t rank = 0; rank < index.num_frames(); ++rank) starts.push_back(index.start_for(rank));
  expect_equal(starts, Frames{0, 0, 0, 0, 2, 2, 6, 6}, __LINE__);
  expect_equal(index.entry_before(6), 2, __LINE__);
  expect_equal(index.entry_before(0), 0, __LINE__);
  expect_equal(index.key_ranks(), Frames{0, 4, 6}, __LINE__);
}

void test_index_tells_what_an_error_spoils() {
  const PacketIndex index = index_of({{'I', 0}, {'P', 1}, {'K', 4}, {'B', 2}, {'B', 3}, {'P', 5}, {'I', 6}, {'P', 7}});
  expect(index.spoils(1, 1) && index.spoils(1, 2), "itself and what may refer to it", __LINE__);
  expect(!index.spoils(1, 0) && !index.spoils(1, 4) && !index.spoils(1, 7), "not what needs nothing of it", __LINE__);
  expect(index.spoils(3, 2) && !index.spoils(3, 3) && !index.spoils(3, 5), "a disposable one only itself", __LINE__);
  expect(index.spoils(2, 5) && !index.spoils(5, 6), "up to the next clean entry", __LINE__);
}

void test_index_without_pts() {
  PacketIndex index = index_of({{'I', kNoTime}, {'P', kNoTime}, {'B', kNoTime}, {'P', kNoTime}, {'B', kNoTime}});
  expect(!index.complete(), "incomplete", __LINE__);
  const auto order = index.order_by_type();
  expect(order.has_value(), "types tell", __LINE__);
  expect_equal(*order, Frames{0, 2, 1, 4, 3}, __LINE__);
  index.set_order(*order);
  expect(index.complete(), "complete", __LINE__);
  expect_equal(index.pts(), Frames{1, 2, 3, 4, 5}, __LINE__);  // due when the decoder gives them
  const PacketIndex repeated = index_of({{'I', 0}, {'P', 1}, {'P', 1}});
  expect(!repeated.complete(), "a time cannot occur twice", __LINE__);
}

void test_index_of_decoded_order() {
  PacketIndex index = index_of({{'P', 0}, {'I', 1}, {'P', 2}});
  index.set_order({1, 2});  // nothing came out for the first
  expect_equal(index.num_frames(), 2, __LINE__);
  expect_equal(index.ordinal(0), 1, __LINE__);
  expect_equal(index.rank(0), -1, __LINE__);
}

void test_index_leaves_out_an_undecodable_start() {
  PacketIndex index = index_of({{'P', 0}, {'K', 3}, {'B', 1}, {'B', 2}, {'P', 4}, {'K', 7}, {'B', 5}, {'B', 6}});
  expect(index.starts_undecodable(), "a picture before the first entry", __LINE__);
  index.leave_out_undecodable_start();
  expect(!index.starts_undecodable() && index.complete(), "left out", __LINE__);
  expect_equal(index.pts(), Frames{3, 4, 5, 6, 7}, __LINE__);
  Frames starts;
  for (int64_t rank = 0; rank < index.num_frames(); ++rank) starts.push_back(index.start_for(rank));
  expect_equal(starts, Frames{1, 1, 1, 1, 5}, __LINE__);
  expect(!index_of({{'I', 2}, {'B', 0}, {'B', 1}}).starts_undecodable(), "a clean entry has none", __LINE__);
}

void test_higher_layers_keep_lower_disposable_pictures() {
  std::vector<IndexEntry> packets(3);
  for (int64_t i = 0; i < 3; ++i) packets[static_cast<size_t>(i)].pts = i;
  packets[0].key = true;
  packets[1].facts = {.disposable = true, .temporal_layer = 1};
  packets[2].facts = {.disposable = true, .temporal_layer = 2};
  const PacketIndex index(packets, {1, 1}, 1);
  expect(!index.disposable(1) && index.disposable(2), "only the top layer is disposable", __LINE__);
}

}  // namespace

int main() {
  test_frame_played_at_an_instant();
  test_uniform_takes_centres_of_segments();
  test_uniform_of_one_frame_takes_the_middle();
  test_fps_steps_from_the_start();
  test_short_clips();
  test_windows_outside_the_video_are_refused();
  test_random_takes_one_instant_in_each_segment();
  test_random_numbers_are_splitmix64();
  test_keyframes();
  test_views();
  test_random_views();
  test_h264_packets();
  test_hevc_packets();
  test_other_packets();
  test_index_orders_by_pts();
  test_index_of_a_pyramid();
  test_index_leaves_out_what_an_edit_list_cuts();
  test_index_start_of_decoding();
  test_index_tells_what_an_error_spoils();
  test_index_without_pts();
  test_index_of_decoded_order();
  test_index_leaves_out_an_undecodable_start();
  test_higher_layers_keep_lower_disposable_pictures();
  std::printf("%d failures\n", failures);
  return failures > 0;
}
