// Load every miss that may be copied, each to the card that would finish it first.
#pragma once

#include "pricing.h"

namespace hybrimoe {

void assign_copy_all(const priced_problem & p, assignment & device_of);

// State of the cards while misses are handed out one by one, heaviest first.
struct card_loads {
    double resident_us[max_devices]; // ready time, step cost and hits
    double queued_us[max_devices];   // work that arrives by copy
    double arrival_us[max_devices];  // end of the last copy handed out
    double chain_us[max_devices];    // end of the arriving work if the card were otherwise idle
    int copies_left[max_devices];

    // Where the card would end if it took one more miss.
    double end_with(const priced_problem & p, int d, int i) const;
    void take(const priced_problem & p, int d, int i);
    double end(int d) const;
    // The card that would finish the miss first, or cpu_device if none may take a copy.
    int first_to_finish(const priced_problem & p, int i) const;
};

// Cards with their hits and loading experts as in `device_of`; misses in it are ignored.
void start_cards(const priced_problem & p, const assignment & device_of, card_loads & out);

} // namespace hybrimoe
