#include "hybrid/cost_source.h"
#include "json_text.h"

#include <cmath>
#include <limits>

namespace hybrimoe {

namespace {

constexpr int64_t max_index = int64_t{1} << 31;

status read_curve(const nlohmann::json & data, cost_curve & out) {
    if (!data.contains("points")) {
        return cost_curve::affine(data.at("fixed_us").get<double>(), data.at("per_token_us").get<double>(), out);
    }
    std::vector<double> x;
    std::vector<double> y;
    for (const nlohmann::json & point : data.at("points")) {
        x.push_back(point.at(0).get<double>());
        y.push_back(point.at(1).get<double>());
    }
    return cost_curve::piecewise(x.data(), y.data(), static_cast<int>(x.size()), out);
}

nlohmann::json describe_curve(const cost_curve & curve) {
    if (curve.n_points() == 0) {
        return {{"fixed_us", curve.fixed_us()}, {"per_token_us", curve.per_token_us()}};
    }
    nlohmann::json points = nlohmann::json::array();
    for (int i = 0; i < curve.n_points(); i++) {
        points.push_back({curve.point_n_tokens(i), curve.point_us(i)});
    }
    return {{"points", points}};
}

} // namespace

status set_layers(const layer_book & book, int n_devices, cost_model & out) {
    HYBRIMOE_TRY(cost_model::create(book.n_layers(), book.n_classes(), n_devices, out));
    for (int layer = 0; layer < book.n_layers(); layer++) {
        HYBRIMOE_TRY(out.set_layer_class(layer, book.layer(layer).cls));
    }
    for (int cls = 0; cls < book.n_classes(); cls++) {
        HYBRIMOE_TRY(out.set_bytes(cls, static_cast<double>(book.of_class(cls).layout.expert_bytes())));
    }
    return {};
}

status calibrated_cost_model(const std::string & json, const layer_book & book, int n_devices, cost_model & out) {
    try {
        const nlohmann::json data = parse_json(json);
        if (static_cast<int>(data.at("layer_class").size()) != book.n_layers() ||
            static_cast<int>(data.at("devices").size()) != n_devices) {
            return status::fail(error_code::invalid_argument,
                                "the calibration is of %d layers and %d devices, not %d and %d",
                                static_cast<int>(data.at("layer_class").size()),
                                static_cast<int>(data.at("devices").size()), book.n_layers(), n_devices);
        }
        HYBRIMOE_TRY(set_layers(book, n_devices, out));
        for (int layer = 0; layer < book.n_layers(); layer++) {
            const int64_t cls     = read_index(data.at("layer_class").at(static_cast<size_t>(layer)), max_index);
            const auto & one      = data.at("classes").at(static_cast<size_t>(cls));
            const int own         = book.layer(layer).cls;
            const double expected = static_cast<double>(book.of_class(own).layout.expert_bytes());
            if (std::abs(one.at("expert_bytes").get<double>() - expected) > 0.01 * expected) {
                return status::fail(error_code::invalid_argument,
                                    "the calibration is of another model: layer %d has %g bytes an expert, not %g",
                                    layer, expected, one.at("expert_bytes").get<double>());
            }
            cost_curve curve;
            HYBRIMOE_TRY(read_curve(one.at("cpu"), curve));
            HYBRIMOE_TRY(out.set_cpu(own, curve, one.at("cpu_first_us").get<double>()));
            for (int d = 0; d < n_devices; d++) {
                HYBRIMOE_TRY(read_curve(one.at("gpu").at(static_cast<size_t>(d)), curve));
                HYBRIMOE_TRY(out.set_gpu(own, d, curve));
            }
        }
        HYBRIMOE_TRY(out.set_step(cpu_device, data.at("cpu_step_us").get<double>()));
        const auto & ceiling = data.at("dram_bytes_per_us");
        HYBRIMOE_TRY(out.set_dram(ceiling.is_null() ? std::numeric_limits<double>::infinity() : ceiling.get<double>()));
        for (int d = 0; d < n_devices; d++) {
            const auto & one = data.at("devices").at(static_cast<size_t>(d));
            HYBRIMOE_TRY(out.set_link(d, one.at("latency_us").get<double>(), one.at("bytes_per_us").get<double>()));
            HYBRIMOE_TRY(out.set_step(d, one.at("step_us").get<double>()));
        }
        return out.check();
    } catch (const std::exception & error) { // the library's, and what json_text.h throws
        return status::fail(error_code::missing_cost, "the calibration cannot be read: %s", error.what());
    }
}

std::string describe_costs(const cost_model & costs) {
    nlohmann::json out;
    for (int layer = 0; layer < costs.n_layers(); layer++) {
        out["layer_class"].push_back(costs.class_of(layer));
    }
    for (int cls = 0; cls < costs.n_classes(); cls++) {
        const layer_class & from = costs.of_class(cls);
        nlohmann::json one       = {
            {"expert_bytes", from.bytes}, {"cpu", describe_curve(from.cpu)}, {"cpu_first_us", from.cpu_first_us}};
        one["gpu"] = nlohmann::json::array();
        for (int d = 0; d < costs.n_devices(); d++) {
            one["gpu"].push_back(describe_curve(from.gpu[d]));
        }
        out["classes"].push_back(std::move(one));
    }
    const double dram        = costs.dram_bytes_per_us();
    out["cpu_step_us"]       = costs.step_us(cpu_device);
    out["dram_bytes_per_us"] = std::isfinite(dram) ? nlohmann::json(dram) : nlohmann::json(nullptr);
    out["devices"]           = nlohmann::json::array();
    for (int d = 0; d < costs.n_devices(); d++) {
        out["devices"].push_back({{"latency_us", costs.link(d).latency_us},
                                  {"bytes_per_us", costs.link(d).bytes_per_us},
                                  {"step_us", costs.step_us(d)}});
    }
    return out.dump();
}

} // namespace hybrimoe
