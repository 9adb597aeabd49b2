//! How far off virtual time is on this machine: `cargo run --release -p tdpmmu-lab --example simulate_error [-- '{"error_reps": 5}']`, best on a machine that does nothing else.
//! Three guest sizes, one and two vCPUs, both pass lists: the table goes to stdout in Markdown, progress to stderr.
use serde_json::{Value, json};
use tdpmmu_lab::{Control, simulate};

const GIB: u64 = 1 << 30;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut config = json!({
        "vcpus": 1, "memory_bytes": GIB, "design": "sync", "passes": ["1G,root", "4K,2M,1G,root"],
        "error_sizes": [4 * GIB, 16 * GIB, 64 * GIB], "error_reps": 5,
    });
    if let Some(text) = std::env::args().nth(1) {
        let Value::Object(more) = serde_json::from_str(&text)? else {
            return Err("expected a JSON object".into());
        };
        for (name, value) in more {
            config[name] = value;
        }
    }
    let control = Control::new(Default::default(), |phase, fraction| {
        if fraction == 0.0 {
            eprintln!("{phase}");
        }
    });
    let config = simulate::SimulateConfig::parse(&config.to_string())?;
    let result = simulate::simulate_zap(&config, &control)?;
    println!("| price | ns | from |\n| --- | ---: | --- |");
    for (name, price) in result["machine"]["costs_ns"].as_object().into_iter().flatten() {
        println!(
            "| {name} | {:.2} | {} |",
            price["ns"].as_f64().unwrap_or(0.0),
            price["source"].as_str().unwrap_or("")
        );
    }
    println!(
        "\n| field | design, passes | vCPUs | guest | measured (median) | min .. max | predicted | factor |"
    );
    println!("| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |");
    for row in result["model_error"]["rows"].as_array().into_iter().flatten() {
        let number = |of: &Value| of.as_f64().unwrap_or(f64::NAN);
        println!(
            "| {} | {}, {} | {} | {} GiB | {} | {} .. {} | {} | {:.2} |",
            row["field"].as_str().unwrap_or(""),
            row["design"].as_str().unwrap_or(""),
            row["passes"].as_str().unwrap_or(""),
            row["vcpus"],
            number(&row["memory_bytes"]) / GIB as f64,
            time(number(&row["measured"]["median"])),
            time(number(&row["measured"]["min"])),
            time(number(&row["measured"]["max"])),
            time(number(&row["predicted"])),
            number(&row["factor"]),
        );
    }
    println!("\n| field | mean factor | worst |\n| --- | ---: | ---: |");
    for field in result["model_error"]["fields"].as_array().into_iter().flatten() {
        let number = |n: usize| field[n].as_f64().unwrap_or(f64::NAN);
        println!("| {} | {:.2} | {:.2} |", field[0].as_str().unwrap_or(""), number(1), number(2));
    }
    Ok(())
}

fn time(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{ns:.2} ns"),
        ns if ns < 1e6 => format!("{:.2} us", ns / 1e3),
        ns if ns < 1e9 => format!("{:.2} ms", ns / 1e6),
        ns => format!("{:.2} s", ns / 1e9),
    }
}
