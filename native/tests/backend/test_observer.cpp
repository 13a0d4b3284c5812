// The observer: its socket's requests, clients that never read, many that come and go, a fork, and what the computing
// thread is asked while it computes; the recorded passes that it hands on, and the routing that it counts in them.
#include "check.h"
#include "counters.h"
#include "hybrimoe.h"
#include "observer/host.h"
#include "observer/observer.h"
#include "observer/report_exchange.h"
#include "observer/socket_folder.h"
#include "observer/trace_feed.h"
#include "trace_recorder.h"
#include "trace_ring.h"

#include "nlohmann/json.hpp"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

using namespace hybrimoe;
using bytes = std::vector<uint8_t>;

namespace {

// One pass that routes `n_rows` tokens of one layer to the given experts.
bytes make_pass(int32_t layer, int32_t n_rows, const std::vector<int32_t> & ids) {
    hybrimoe_trace_event event{};
    event.type   = static_cast<int32_t>(trace_kind::routed);
    event.layer  = layer;
    event.n_rows = n_rows;
    event.a      = static_cast<int32_t>(ids.size()) / n_rows;
    hybrimoe_trace_pass head{};
    head.n_events = 1;
    head.n_ids    = static_cast<int64_t>(ids.size());
    head.n_bytes  = sizeof(head) + sizeof(event) + ids.size() * sizeof(int32_t);
    head.n_bytes += (8 - head.n_bytes % 8) % 8;
    bytes out(head.n_bytes);
    std::memcpy(out.data(), &head, sizeof(head));
    std::memcpy(out.data() + sizeof(head), &event, sizeof(event));
    std::memcpy(out.data() + sizeof(head) + sizeof(event), ids.data(), ids.size() * sizeof(int32_t));
    return out;
}

void push(trace_ring & ring, const bytes & pass) {
    const trace_part part{pass.data(), pass.size()};
    CHECK(ring.push(&part, 1));
}

void test_heat() {
    routing_heat heat;
    CHECK(heat.shares().empty());
    const bytes both = make_pass(1, 2, {3, 5, 3, 5});
    heat.add(*reinterpret_cast<const hybrimoe_trace_pass *>(both.data()));
    auto shares = heat.shares();
    CHECK(shares.size() == 2 && shares[0] == std::vector<double>(6, 0.0));
    CHECK(shares[1] == (std::vector<double>{0, 0, 0, 0.5, 0, 0.5}));
    // After 256 more tokens what was before counts half.
    routing_heat fading;
    const bytes old_one = make_pass(0, 256, std::vector<int32_t>(256, 0));
    const bytes new_one = make_pass(0, 256, std::vector<int32_t>(256, 1));
    for (int i = 0; i < 3000; i++) { // more than weights of one scale hold
        fading.add(*reinterpret_cast<const hybrimoe_trace_pass *>(old_one.data()));
    }
    fading.add(*reinterpret_cast<const hybrimoe_trace_pass *>(new_one.data()));
    shares = fading.shares();
    CHECK(std::fabs(shares[0][0] - 0.5) < 1e-6 && std::fabs(shares[0][1] - 0.5) < 1e-6);
    const bytes damaged = make_pass(-3, 1, {1 << 30, -1});
    fading.add(*reinterpret_cast<const hybrimoe_trace_pass *>(damaged.data()));
    CHECK(fading.shares() == shares);
}

void test_feed() {
    trace_ring ring(1 << 20);
    const auto pop = [&](uint8_t * out, size_t size) { return ring.pop(out, size); };
    trace_feed feed(pop, true);
    const bytes pass = make_pass(0, 1, {1, 2});
    push(ring, pass);
    const int late = feed.add_reader();
    push(ring, pass);
    bytes out(10 * pass.size());
    CHECK(feed.read(trace_feed::host, out.data(), out.size()) == static_cast<int64_t>(2 * pass.size()));
    CHECK(feed.read(late, out.data(), pass.size() - 1) == -static_cast<int64_t>(pass.size()));
    CHECK(feed.read(late, out.data(), out.size()) == static_cast<int64_t>(pass.size()));
    CHECK(std::memcmp(out.data(), pass.data(), pass.size()) == 0);
    CHECK(feed.read(late, out.data(), out.size()) == 0 && feed.read(77, out.data(), out.size()) == -1);
    feed.remove_reader(late);
    CHECK(feed.read(late, out.data(), out.size()) == -1);
    // One who does not read loses passes, and is told how many.
    const int slow    = feed.add_reader();
    const bytes large = make_pass(0, 1, std::vector<int32_t>(100000, 1));
    int n_pushed      = 0;
    for (; feed.n_lost(slow) < 3; n_pushed++) {
        push(ring, large);
        feed.drain();
    }
    bytes taken(large.size());
    int64_t n_read = 0, n_dropped = 0;
    const auto take = [&] {
        while (feed.read(slow, taken.data(), taken.size()) > 0) {
            n_read++;
            n_dropped += static_cast<int64_t>(reinterpret_cast<hybrimoe_trace_pass *>(taken.data())->n_dropped);
        }
    };
    take();
    push(ring, large);
    take();
    CHECK(n_dropped == 3 && n_read + n_dropped == n_pushed + 1);
    CHECK(trace_feed(pop, false).read(trace_feed::host, out.data(), out.size()) == -1);
}

// While the thread that computes is at work, it answers; else whoever asks looks for itself.
void test_reports() {
    report_exchange<std::string> reports;
    const auto me = [](unsigned) {
        return std::string(std::this_thread::get_id() == std::thread::id() ? "" : "looked");
    };
    CHECK(reports.ask(1, me) == "looked");
    std::atomic<bool> stop{false}, began{false};
    std::thread worker([&] {
        while (!stop) {
            reports.begin_work();
            began = true;
            reports.answer([](unsigned parts) { return "answered " + std::to_string(parts); });
            std::this_thread::yield();
        }
        reports.end_work();
    });
    while (!began) {
    }
    int n_answered = 0;
    for (int i = 0; i < 50; i++) {
        const std::string answer = reports.ask(2, me);
        CHECK(answer == "answered 2" || answer == "looked");
        n_answered += answer == "answered 2" ? 1 : 0;
    }
    CHECK(n_answered > 0);
    stop = true;
    worker.join();
    CHECK(reports.ask(1, me) == "looked");
}

// An instance that records into a ring of its own.
class fake_instance : public instance_view {
public:
    instance_report report(unsigned) const override { return {"{\"layers\":[]}", "[]", "{\"is_set_up\":true}"}; }
    bool next_event(uint64_t after, uint64_t & number, std::string & line) const override {
        number = after + 1;
        line   = "event \xff"; // no UTF-8
        return after < 3;
    }
    trace_feed * feed() const override { return &feed_; }
    bool stop_trace() const override { return true; }

    mutable trace_ring ring{1 << 20};

private:
    mutable trace_feed feed_{[this](uint8_t * out, size_t size) { return ring.pop(out, size); }, false};
};

class connection {
public:
    connection() : fd_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::strncpy(address.sun_path, observer_path().c_str(), sizeof(address.sun_path) - 1);
        is_open = ::connect(fd_, reinterpret_cast<sockaddr *>(&address), sizeof(address)) == 0;
        const timeval patience{20, 0};
        ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    }
    ~connection() { ::close(fd_); }
    connection(const connection &)             = delete;
    connection & operator=(const connection &) = delete;

    void write(const std::string & text) const { (void)!::send(fd_, text.data(), text.size(), MSG_NOSIGNAL); }
    std::string line() const {
        std::string out;
        for (char c = 0; ::recv(fd_, &c, 1, 0) == 1 && c != '\n';) {
            out += c;
        }
        return out;
    }
    nlohmann::json ask(const std::string & request) const {
        write(request + "\n");
        const std::string answer = line();
        return answer.empty() ? nlohmann::json() : nlohmann::json::parse(answer);
    }
    size_t read(uint8_t * out, size_t size) const {
        size_t n = 0;
        for (ssize_t got = 1; n < size && got > 0; n += static_cast<size_t>(std::max<ssize_t>(0, got))) {
            got = ::recv(fd_, out + n, size - n, 0);
        }
        return n;
    }

    bool is_open = false;

private:
    int fd_;
};

void test_requests(uint64_t id) {
    const connection one;
    const nlohmann::json all = one.ask("snapshot");
    CHECK(all["pid"] == ::getpid() && all["socket"] == observer_path() && all["instances"].size() == 1);
    CHECK(all["instances"][0]["events"].size() == 3 && all["instances"][0]["id"] == id);
    CHECK(one.ask("snapshot events after=2")["instances"][0]["events"][0][0] == 3);
    CHECK(one.ask("snapshot what")["error"].is_string() && one.ask("")["error"].is_string());
    CHECK(one.ask("trace instance=999")["error"].is_string());
    one.write("snap");
    one.write("shot counters\n");
    CHECK(one.line().size() > 100);
    const connection endless;
    endless.write(std::string(10000, 'x'));
    CHECK(endless.line().empty()); // closed
}

void test_stream(const fake_instance & source) {
    const connection one;
    CHECK(one.ask("trace")["instances"][0]["trace"]["is_set_up"] == true);
    const bytes pass = make_pass(0, 1, {1, 2, 3});
    bytes got(pass.size());
    for (int i = 0; i < 5; i++) {
        push(source.ring, pass);
        CHECK(one.read(got.data(), got.size()) == got.size() && got == pass);
    }
    const connection other;
    CHECK(other.ask("snapshot heat")["instances"][0]["heat"][0].size() == 4);
}

void test_crowds() {
    {
        std::deque<connection> idle(8); // one cannot be asked any more
        for (const connection & one : idle) {
            CHECK(one.ask("snapshot counters").is_object());
        }
        CHECK(connection().ask("snapshot").is_null());
    }
    const connection never_reads;
    for (int i = 0; i < 200; i++) {
        never_reads.write("snapshot\n");
    }
    for (int i = 0; i < 50; i++) {
        const connection quick;
        if (i % 2 == 0) {
            quick.write("snapshot\n");
        }
    }
    nlohmann::json answer;
    for (int i = 0; i < 100 && answer.is_null(); i++) { // those that have left make room
        answer = connection().ask("snapshot counters");
    }
    CHECK(answer.is_object());
}

// A fork's child lacks the thread whose memory it has: what that held looks lost to a leak checker.
bool is_child = false;

void test_fork() {
    const pid_t child = ::fork();
    if (child == 0) {
        is_child          = true;
        const bool served = !observer_path().empty();
        start_observer();
        std::exit(served || !observer_path().empty() ? 1 : 0); // with all destructors
    }
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(std::filesystem::exists(observer_path()) && connection().ask("snapshot").is_object());
}

void test_folder(const std::string & scratch) {
    std::string why;
    CHECK(make_private(scratch + "/a/b", why) && std::filesystem::is_directory(scratch + "/a/b"));
    ::chmod((scratch + "/a/b").c_str(), 0755);
    CHECK(make_private(scratch + "/a/b", why));
    struct stat status{};
    CHECK(::stat((scratch + "/a/b").c_str(), &status) == 0 && (status.st_mode & 0777) == 0700);
    std::filesystem::create_symlink(scratch + "/a", scratch + "/link");
    CHECK(!make_private(scratch + "/link", why) && why.find("private") != std::string::npos);
    ::setenv("XDG_RUNTIME_DIR", (scratch + "/" + std::string(100, 'x')).c_str(), 1);
    CHECK(runtime_folder().find("hybrimoe-") != std::string::npos);
    ::unsetenv("XDG_RUNTIME_DIR");
    ::setenv("XDG_STATE_HOME", "/s", 1);
    CHECK(runtime_folder() == "/s/hybrimoe/live");
    ::unsetenv("XDG_STATE_HOME");
    ::setenv("HOME", "/h", 1);
    CHECK(runtime_folder() == "/h/.local/state/hybrimoe/live");
    ::setenv("XDG_RUNTIME_DIR", scratch.c_str(), 1);
    CHECK(runtime_folder() == scratch + "/hybrimoe");
}

void test_program_names() {
    using words = std::vector<std::string>;
    CHECK(program_name("llama-server", words{"/usr/bin/llama-server", "-m", "x"}) == "llama-server");
    CHECK(program_name("ld-linux-x86-64", words{"/lib/ld-linux-x86-64.so.2", "--library-path", "/a:/b", "--argv0", "x",
                                                "--inhibit-cache", "/opt/bin/llama-cli", "-m", "x"}) == "llama-cli");
    CHECK(program_name("ld-linux-x86-64", words{"/lib/ld-linux-x86-64.so.2", "--help"}) == "ld-linux-x86-64");
    CHECK(program_name("ld-linux-x86-64", words{}) == "ld-linux-x86-64");
}

} // namespace

// LeakSanitizer asks this.
extern "C" int __lsan_is_turned_off();
extern "C" int __lsan_is_turned_off() {
    return is_child ? 1 : 0;
}

int main() {
    test_heat();
    test_feed();
    test_reports();
    char scratch[] = "/tmp/hybrimoe-observer-XXXXXX";
    CHECK(::mkdtemp(scratch) != nullptr);
    test_folder(scratch);

    start_observer();
    CHECK(observer_path().empty()); // it was not asked for
    // Something that is no socket, and a socket that a process with our number has left.
    const std::string folder = runtime_folder();
    std::string why;
    CHECK(make_private(folder, why));
    const std::string usual = folder + "/" + std::to_string(::getpid()) + ".sock";
    CHECK(std::ofstream(usual).good());
    CHECK(hybrimoe_configure(R"({"observe": true})", nullptr, 0) == 0);
    start_observer();
    CHECK(observer_path() == folder + "/" + std::to_string(::getpid()) + "-2.sock");
    struct stat status{};
    CHECK(::stat(observer_path().c_str(), &status) == 0 && (status.st_mode & 0777) == 0600);

    const fake_instance source;
    const instance_ticket ticket = register_instance();
    show_instance(ticket.id, &source);
    test_program_names();
    test_requests(ticket.id);
    test_stream(source);
    test_crowds();
    test_fork();
    forget_instance(ticket.id);
    CHECK(connection().ask("snapshot state events")["instances"].empty()); // another request than the last one
    std::filesystem::remove(usual);
    return check::report();
}
