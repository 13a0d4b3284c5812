// The dispatch's lines of text: numbered from 1, the newest kept, readable while others write.
#include "check.h"
#include "hybrid/event_log.h"

#include <string>
#include <thread>
#include <vector>

using namespace hybrimoe;

namespace {

std::vector<std::string> all(const event_log & log, uint64_t after = 0) {
    std::vector<std::string> lines;
    uint64_t number = after;
    std::string line;
    while (log.next(number, number, line)) {
        lines.push_back(std::to_string(number) + " " + line);
    }
    return lines;
}

void test_order() {
    event_log log(false);
    CHECK(all(log).empty());
    log.add("plain");
    log.add("%d of %s", 2, "two");
    CHECK((all(log) == std::vector<std::string>{"1 plain", "2 2 of two"}));
    CHECK((all(log, 1) == std::vector<std::string>{"2 2 of two"}));
    CHECK(all(log, 2).empty() && all(log, 99).empty());
}

void test_old_lines_go() {
    event_log log(false);
    for (int i = 1; i <= 1000; i++) {
        log.add("line %d", i);
    }
    const std::vector<std::string> kept = all(log);
    CHECK(kept.size() >= 100 && kept.size() < 1000);
    CHECK(kept.back() == "1000 line 1000");
    const std::string first = std::to_string(1001 - kept.size());
    CHECK(kept.front() == first + " line " + first);
    CHECK(all(log, 3) == kept); // who asks for a line that is gone gets the oldest there is
}

void test_long_line() {
    event_log log(false);
    log.add("%s", std::string(5000, 'x').c_str());
    log.add("after");
    const std::vector<std::string> kept = all(log);
    CHECK(kept.size() == 2 && kept[0].size() < 5000 && kept[0].size() > 100 && kept[1] == "2 after");
}

void test_threads() {
    event_log log(false);
    std::vector<std::thread> writers;
    for (int w = 0; w < 3; w++) {
        writers.emplace_back([&log, w] {
            for (int i = 0; i < 500; i++) {
                log.add("writer %d line %d", w, i);
            }
        });
    }
    uint64_t number = 0;
    uint64_t last   = 0;
    std::string line;
    for (int i = 0; i < 2000; i++) {
        if (log.next(last, number, line)) {
            CHECK(number > last && line.rfind("writer ", 0) == 0);
            last = number;
        }
    }
    for (std::thread & writer : writers) {
        writer.join();
    }
    while (log.next(last, number, line)) {
        last = number;
    }
    CHECK(last == 1500);
}

} // namespace

int main() {
    test_order();
    test_old_lines_go();
    test_long_line();
    test_threads();
    return check::report();
}
