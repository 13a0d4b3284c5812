#include "observer/observer.h"

#include "counters.h"
#include "observer/host.h"
#include "observer/snapshot.h"
#include "observer/socket_folder.h"
#include "observer/trace_feed.h"
#include "settings.h"

#include <cstdio>
#include <mutex>

#ifdef __linux__
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <list>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <vector>
#endif

namespace hybrimoe {

#ifdef __linux__

namespace {

using steady = std::chrono::steady_clock;

constexpr size_t max_clients       = 8;
constexpr size_t max_request_bytes = 4096;
constexpr size_t piece_bytes       = size_t{1} << 20;          // of a stream of passes
constexpr auto client_patience     = std::chrono::seconds(10); // with an answer that is not taken
constexpr auto idle_patience       = std::chrono::seconds(60); // without a request
// The same request within this time gets the same answer: however often somebody asks, a step is disturbed rarely.
constexpr auto shared_answer = std::chrono::milliseconds(50);
// How often rings are read: where somebody reads along, and else, so that routing that nobody looks at is seen too.
constexpr int stream_period_ms = 100, quiet_period_ms = 1000;
constexpr size_t stack_bytes = size_t{512} << 10;

// A file descriptor that is closed once, and not inherited by programs that the host starts.
class descriptor {
public:
    descriptor() = default;
    explicit descriptor(int fd) : fd_(fd) {}
    ~descriptor() { reset(); }
    descriptor(descriptor && other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
    descriptor & operator=(descriptor && other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    int get() const { return fd_; }
    void reset() {
        if (fd_ >= 0) {
            ::close(fd_);
        }
        fd_ = -1;
    }

private:
    int fd_ = -1;
};

sockaddr_un address_of(const std::string & path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.c_str(), std::min(path.size(), sizeof(address.sun_path) - 1));
    return address;
}

int connect_to(int fd, const std::string & path) {
    const sockaddr_un address = address_of(path);
    return ::connect(fd, reinterpret_cast<const sockaddr *>(&address), sizeof(address));
}

// Whether a socket is what a process that is gone has left.
bool is_left_over(const std::string & path) {
    struct stat status{};
    if (::lstat(path.c_str(), &status) != 0 || !S_ISSOCK(status.st_mode)) {
        return false;
    }
    const descriptor probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    return connect_to(probe.get(), path) != 0 && errno == ECONNREFUSED;
}

struct client {
    explicit client(descriptor fd) : connection(std::move(fd)) {}
    client(const client &)             = delete;
    client & operator=(const client &) = delete;
    ~client() { stop_stream(); }

    bool is_stream() const { return reader > 0; }
    bool has_unsent() const { return n_sent < out.size(); }
    void stop_stream() {
        if (is_stream()) {
            ask_instance(instance, [this](const instance_view & view) {
                if (view.feed() != nullptr) {
                    view.feed()->remove_reader(reader);
                }
                return true;
            });
        }
        reader = 0;
    }

    descriptor connection;
    std::string in, out;
    size_t n_sent            = 0; // of `out`
    steady::time_point moved = steady::now();
    uint64_t instance        = 0; // of a stream of passes
    int reader               = 0;
};

class server {
public:
    server() {
        for (std::atomic<int> & fd : connections_) {
            fd = -1;
        }
    }

    // Throws nothing; says why it cannot serve.
    bool start(std::string & why_not) {
        const std::string folder = runtime_folder();
        if (!make_private(folder, why_not) || !listen_in(folder, why_not)) {
            return false;
        }
        process_ = ::getpid();
        wake_    = descriptor(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        if (wake_.get() < 0 || !start_thread()) {
            why_not = "its thread cannot be started";
            ::unlink(path_.c_str());
            return false;
        }
        is_running_ = true;
        return true;
    }

    bool is_ours() const { return is_running_ && process_ == ::getpid(); }
    const std::string & path() const { return path_; }

    // In a fork's child: its copies of the descriptors would keep a dead parent's socket alive.
    void leave_to_parent() {
        listening_.reset();
        wake_.reset();
        for (const std::atomic<int> & fd : connections_) { // the list of clients may be half changed
            if (fd >= 0) {
                ::close(fd);
            }
        }
        is_running_ = false;
    }

    // Ends the thread and removes the socket; nothing in a fork's child.
    void stop() {
        if (!is_ours()) {
            return;
        }
        is_running_         = false;
        is_stopping_        = true;
        const uint64_t once = 1;
        (void)!::write(wake_.get(), &once, sizeof(once));
        pthread_join(thread_, nullptr);
        ::unlink(path_.c_str());
    }

private:
    bool listen_in(const std::string & folder, std::string & why_not) {
        // Another process may have our number: containers can share a folder.
        for (int n = 1; n <= 9; n++) {
            path_ = folder + "/" + std::to_string(::getpid()) + (n == 1 ? "" : "-" + std::to_string(n)) + ".sock";
            if (path_.size() > max_socket_path_bytes) {
                why_not = "the path '" + path_ + "' is too long for a socket";
                return false;
            }
            if (is_left_over(path_)) {
                ::unlink(path_.c_str());
            }
            listening_                = descriptor(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
            const sockaddr_un address = address_of(path_);
            if (listening_.get() < 0) {
                break;
            }
            if (::bind(listening_.get(), reinterpret_cast<const sockaddr *>(&address), sizeof(address)) == 0) {
                if (::chmod(path_.c_str(), 0600) == 0 && ::listen(listening_.get(), max_clients) == 0) {
                    return true;
                }
                ::unlink(path_.c_str());
                break;
            }
            if (errno != EADDRINUSE) {
                break;
            }
        }
        why_not = "the socket '" + path_ + "' cannot be made: " + std::strerror(errno);
        return false;
    }

    bool start_thread() {
        sigset_t all, before;
        sigfillset(&all);
        pthread_attr_t attributes;
        if (pthread_attr_init(&attributes) != 0) {
            return false;
        }
        pthread_attr_setstacksize(&attributes, stack_bytes);
        // The host's signals are the host's: a thread starts with the mask of the one that makes it.
        pthread_sigmask(SIG_BLOCK, &all, &before);
        const auto run = [](void * self) -> void * {
            static_cast<server *>(self)->run();
            return nullptr;
        };
        const int failed = pthread_create(&thread_, &attributes, run, this);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_attr_destroy(&attributes);
        if (failed == 0) {
            pthread_setname_np(thread_, "hybrimoe-live");
        }
        return failed == 0;
    }

    // --- the thread

    void run() noexcept {
        while (!is_stopping_) {
            try {
                wait();
                drain_rings();
                serve();
            } catch (const std::exception &) { // no memory: those who wait for an answer are let go
                clients_.clear();
            }
        }
        clients_.clear();
    }

    void wait() {
        polled_.clear();
        polled_.push_back({wake_.get(), POLLIN, 0});
        polled_.push_back({listening_.get(), POLLIN, 0});
        bool has_streams = false;
        for (const client & one : clients_) {
            const int events = one.has_unsent() ? POLLOUT : POLLIN;
            polled_.push_back({one.connection.get(), static_cast<short>(events), 0});
            has_streams = has_streams || one.is_stream();
        }
        ::poll(polled_.data(), polled_.size(), has_streams ? stream_period_ms : quiet_period_ms);
    }

    void drain_rings() {
        const auto now = steady::now();
        if (now - drained_ < std::chrono::milliseconds(stream_period_ms / 2)) {
            return;
        }
        drained_ = now;
        for (const uint64_t id : all_instances()) {
            ask_instance(id, [](const instance_view & view) {
                if (view.feed() != nullptr) {
                    view.feed()->drain();
                }
                return true;
            });
        }
    }

    void serve() {
        size_t at = 2;
        for (auto one = clients_.begin(); one != clients_.end(); at++) {
            const bool goes_on = serve(*one, polled_[at].revents);
            one                = goes_on ? std::next(one) : clients_.erase(one);
        }
        note_connections();
        if ((polled_[1].revents & POLLIN) != 0) {
            accept_all();
        }
    }

    void note_connections() {
        auto one = clients_.begin();
        for (std::atomic<int> & fd : connections_) {
            fd = one == clients_.end() ? -1 : (one++)->connection.get();
        }
    }

    void accept_all() {
        for (;;) {
            descriptor made(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
            if (made.get() < 0) {
                return;
            }
            if (clients_.size() < max_clients) {
                clients_.emplace_back(std::move(made));
                note_connections();
            }
        }
    }

    // Returns whether the client stays.
    bool serve(client & one, short events) {
        if (one.is_stream() && !one.has_unsent() && !next_passes(one)) {
            return false; // the instance is gone, and all of it was sent
        }
        if (one.has_unsent()) {
            return send(one) && (!one.has_unsent() || steady::now() - one.moved < client_patience);
        }
        if ((events & (POLLIN | POLLHUP | POLLERR)) == 0) {
            return one.is_stream() || steady::now() - one.moved < idle_patience;
        }
        char piece[max_request_bytes];
        const ssize_t n = ::recv(one.connection.get(), piece, sizeof(piece), 0);
        if (n <= 0) {
            return n < 0 && (errno == EAGAIN || errno == EINTR);
        }
        one.in.append(piece, static_cast<size_t>(n));
        const size_t end = one.in.find('\n');
        if (end == std::string::npos) {
            return one.in.size() <= max_request_bytes;
        }
        const std::string line = one.in.substr(0, end);
        one.in.erase(0, end + 1);
        if (one.is_stream() || one.in.size() > max_request_bytes) {
            return false; // a stream has nothing more to be asked
        }
        answer(one, line);
        return send(one);
    }

    void answer(client & one, const std::string & line) {
        const size_t space     = line.find(' ');
        const std::string verb = line.substr(0, space);
        const std::string rest = space == std::string::npos ? std::string() : line.substr(space + 1);
        one.n_sent             = 0;
        one.moved              = steady::now();
        if (verb == "snapshot") {
            if (rest != last_request_ || steady::now() - last_answered_ > shared_answer) {
                last_answer_   = make_snapshot(rest) + "\n";
                last_request_  = rest;
                last_answered_ = steady::now();
            }
            one.out = last_answer_;
        } else if (verb == "trace") {
            begin_stream(one, rest);
        } else {
            one.out = "{\"error\":\"requests are 'snapshot' and 'trace'\"}\n";
        }
    }

    // The newest instance that records, or the one that was named; the passes that come after this moment.
    void begin_stream(client & one, const std::string & rest) {
        one.out = "{\"error\":\"nothing is recorded there\"}\n";
        for (const uint64_t id : all_instances()) {
            if (!rest.empty() && rest != "instance=" + std::to_string(id)) {
                continue;
            }
            one.stop_stream();
            const bool is_there = ask_instance(id, [&](const instance_view & view) {
                if (view.feed() == nullptr) {
                    return false;
                }
                one.reader = view.feed()->add_reader();
                return true;
            });
            if (is_there) {
                one.instance = id;
                one.out      = make_snapshot("state trace instance=" + std::to_string(id)) + "\n";
            }
        }
    }

    bool next_passes(client & one) {
        one.out.resize(piece_bytes);
        one.n_sent           = 0;
        int64_t n            = 0;
        const bool is_living = ask_instance(one.instance, [&](const instance_view & view) {
            n = view.feed()->read(one.reader, reinterpret_cast<uint8_t *>(one.out.data()), one.out.size());
            if (n < -1) {
                one.out.resize(static_cast<size_t>(-n));
                n = view.feed()->read(one.reader, reinterpret_cast<uint8_t *>(one.out.data()), one.out.size());
            }
            return true;
        });
        one.out.resize(n > 0 ? static_cast<size_t>(n) : 0);
        if (n > 0) {
            one.moved = steady::now();
        } else {
            one.out.shrink_to_fit();
        }
        return is_living;
    }

    static bool send(client & one) {
        while (one.has_unsent()) {
            const ssize_t n = ::send(one.connection.get(), one.out.data() + one.n_sent, one.out.size() - one.n_sent,
                                     MSG_NOSIGNAL | MSG_DONTWAIT);
            if (n < 0) {
                return errno == EAGAIN || errno == EINTR;
            }
            one.n_sent += static_cast<size_t>(n);
            one.moved = steady::now();
        }
        one.out.clear();
        one.n_sent = 0;
        return true;
    }

    std::string path_;
    descriptor listening_, wake_;
    pthread_t thread_{};
    pid_t process_ = 0;
    std::atomic<bool> is_running_{false}, is_stopping_{false};

    std::list<client> clients_;
    std::array<std::atomic<int>, max_clients> connections_; // theirs, for a fork's child
    std::string last_request_, last_answer_;
    steady::time_point last_answered_{};
    std::vector<pollfd> polled_;
    steady::time_point drained_{};
};

std::mutex start_mutex;
std::atomic<server *> running{nullptr};
bool is_tried = false;

// Stops the server before what it uses is destroyed. The server itself stays: a fork's child, which has its memory but
// not its thread, must not take it apart.
struct stopper {
    ~stopper() {
        if (server * one = running.exchange(nullptr)) {
            one->stop();
        }
    }
};

} // namespace

void start_observer() {
    if (running.load() != nullptr || !current_settings().observe) {
        return;
    }
    std::lock_guard<std::mutex> lock(start_mutex);
    if (is_tried) {
        return;
    }
    is_tried = true;
    // What the thread uses must be made before, so that it is destroyed after the thread has ended.
    (void)make_snapshot("state");
    static server & the_server = *new server;
    static const stopper at_exit;
    std::string why_not;
    if (!the_server.start(why_not)) {
        if (current_settings().log_to_stderr) {
            std::fprintf(stderr, "warning: HybriMoE: nobody can watch this process: %s\n", why_not.c_str());
        }
        return;
    }
    running = &the_server;
    pthread_atfork(nullptr, nullptr, [] {
        if (server * one = running.exchange(nullptr)) {
            one->leave_to_parent();
        }
    });
}

std::string observer_path() {
    const server * one = running.load();
    return one != nullptr && one->is_ours() ? one->path() : std::string();
}

#else

void start_observer() {}

std::string observer_path() {
    return {};
}

#endif

} // namespace hybrimoe
